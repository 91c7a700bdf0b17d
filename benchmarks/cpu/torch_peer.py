"""Time lerobot's own policy in PyTorch, float32 or under bfloat16 autocast. Prints JSON like `peer.py`.

python benchmarks/cpu/torch_peer.py CHECKPOINT INPUTS.npz OUTPUT.npy --precision bf16
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantvla.families import load_policy
from quantvla.families.base import Stage


def run_stage(stage: Stage, known: dict[str, Any]) -> dict[str, Any]:
    """Return a stage's named outputs; what autocast computes in bfloat16 is handed on in float32."""
    with torch.inference_mode():
        found = stage.module(*(torch.from_numpy(known[spec.name]) for spec in stage.inputs))
    values = found if isinstance(found, tuple) else (found,)
    return {
        spec.name: (value.float() if value.is_floating_point() else value).numpy()
        for spec, value in zip(stage.outputs, values, strict=True)
    }


def main() -> None:
    """Load, warm up, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--precision", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with np.load(options.inputs) as file:
        given = dict(file)
    start = time.perf_counter()
    with redirect_stdout(sys.stderr):  # lerobot prints while it builds
        loaded = load_policy(options.checkpoint)
    load_ms = (time.perf_counter() - start) * 1e3
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16")
    times: dict[str, list[float]] = {}

    def chunk(record: bool) -> Any:
        begin = time.perf_counter()
        known, x = dict(given), given["noise"]
        for stage in loaded.stages:
            for t in given["timesteps"][: stage.repeat]:
                known |= {"x": x, "timestep": np.array([t], np.float32)}
                tick = time.perf_counter()
                known |= run_stage(stage, known)
                if record:
                    times.setdefault(stage.name, []).append((time.perf_counter() - tick) * 1e3)
                if stage.name == loaded.interface.sampler.stage:
                    x = x + np.float32(given["step"]) * known["velocity"]
        if record:
            times.setdefault("chunk", []).append((time.perf_counter() - begin) * 1e3)
        return x

    with autocast:
        np.save(options.output, chunk(record=False))
        for _ in range(options.repeats):
            chunk(record=True)
    status = Path("/proc/self/status").read_text()
    resident = next(
        int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")
    )
    print(json.dumps({
        "times_ms": times, "load_ms": load_ms, "resident_mb": resident / 1024,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
