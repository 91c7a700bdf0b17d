"""Latency and memory of a float policy in PyTorch, measured as `quantvla.runtime.bench` measures an engine.

The chunk is lerobot's own call on a raw observation. The stages are the policy's stage modules
run one by one in PyTorch, since lerobot does not run them apart.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from quantvla.runtime.bench import Percentiles
from quantvla.runtime.errors import QuantVLAError, explain
from quantvla.runtime.machine import memory, physical_cores

if TYPE_CHECKING:
    from quantvla.families.base import Interface
    from quantvla.float_policy import FloatPolicy


class PolicyBenchReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured; the fields mean what they mean in `quantvla.runtime.bench.BenchReport`."""

    chunk_ms: Percentiles
    stages: dict[str, Percentiles]
    denoise_steps: int
    peak_rss_mb: float | None
    resident_mb: float | None
    threads: int
    repeats: int
    warmup: int


def bench_policy(
    checkpoint: Path, *, repeats: int = 50, warmup: int = 5, threads: int | None = None
) -> PolicyBenchReport:
    """Return latency and memory of a LeRobot checkpoint, measured in a fresh child process.

    Raises `QuantVLAError` with the child's message if the policy cannot be run.
    """
    threads = physical_cores() if threads is None else threads
    options = [str(checkpoint), str(repeats), str(warmup), str(threads)]
    command = [sys.executable, "-m", __name__, *options]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode != 0:
        raise explain(
            checkpoint,
            "the policy could not be measured",
            got=child.stderr.strip().splitlines()[-1:] or f"status {child.returncode}",
            remedy="check that the checkpoint loads and that there is enough memory",
        )
    return msgspec.json.decode(child.stdout, type=PolicyBenchReport)


def measure(checkpoint: Path, repeats: int, warmup: int, threads: int) -> PolicyBenchReport:
    """Return the report of a checkpoint, measured in this process."""
    from quantvla.float_policy import FloatPolicy

    policy = FloatPolicy.from_pretrained(checkpoint, threads=threads)
    interface = policy.loaded.interface
    obs = _random_observation(interface)
    chunk_ms = []
    for seed in range(-warmup, repeats):
        start_ns = time.perf_counter_ns()
        policy.predict_action_chunk(obs, seed=abs(seed))
        if seed >= 0:
            chunk_ms.append((time.perf_counter_ns() - start_ns) / 1e6)
    after = memory()
    return PolicyBenchReport(
        chunk_ms=_percentiles(chunk_ms),
        stages=_measure_stages(policy, obs, repeats, warmup),
        denoise_steps=len(interface.sampler.timesteps),
        peak_rss_mb=round(after.peak_rss_mb, 1) if after else None,
        resident_mb=round(after.resident_mb, 1) if after else None,
        threads=threads,
        repeats=repeats,
        warmup=warmup,
    )


def _measure_stages(
    policy: FloatPolicy, obs: dict[str, Any], repeats: int, warmup: int
) -> dict[str, Percentiles]:
    """Return the time of one call of each stage, each repeated by itself."""
    from quantvla import staged

    loaded = policy.loaded
    sampler = loaded.interface.sampler
    known = staged.prepare(staged.make_preprocessor(loaded.interface), obs)
    known |= {
        sampler.state: policy.sample_noise(0),
        sampler.time: np.array([sampler.timesteps[0]], np.float32),
    }
    found = {}
    for stage in loaded.stages:
        times_ms = []
        for index in range(-warmup, repeats):
            start_ns = time.perf_counter_ns()
            outputs = staged.run_stage(stage, known)
            if index >= 0:
                times_ms.append((time.perf_counter_ns() - start_ns) / 1e6)
        known |= outputs
        found[stage.name] = _percentiles(times_ms)
    return found


def _random_observation(interface: Interface) -> dict[str, Any]:
    """Return an observation with noise for images and the mean state, the same each time."""
    rng = np.random.default_rng(0)
    obs: dict[str, Any] = {
        camera.key: rng.integers(0, 256, (camera.height, camera.width, 3), dtype=np.uint8)
        for camera in interface.cameras
    }
    statistics = interface.statistics.get(interface.state.key)
    mean = statistics.mean if statistics is not None else None
    state = np.zeros(interface.state.dim) if mean is None else np.array(mean)
    return {**obs, interface.state.key: state, interface.task_key: "pick"}


def _percentiles(times_ms: list[float]) -> Percentiles:
    p50, p99 = np.percentile(times_ms, (50, 99))
    return Percentiles(round(float(p50), 4), round(float(p99), 4))


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    for name in ("repeats", "warmup", "threads"):
        parser.add_argument(name, type=int)
    options = parser.parse_args()
    try:
        with redirect_stdout(sys.stderr):  # lerobot prints while it loads
            report = measure(options.checkpoint, options.repeats, options.warmup, options.threads)
    except QuantVLAError as error:
        print(error, file=sys.stderr)
        return 2
    print(msgspec.json.encode(report).decode())
    return 0


if __name__ == "__main__":
    sys.exit(_main())
