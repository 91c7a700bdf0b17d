"""Full-size SmolVLA (450 M parameters, random weights, two 512x512 cameras): cost of compiling and of a chunk.

    python benchmarks/full_size/run.py                 # about 25 minutes on two cores, 6 GB of disk
    python benchmarks/full_size/run.py --size tiny     # a rehearsal in two minutes

Every step is the product's own command in a fresh process; its wall time and peak resident memory are
those of that process. The engines and lerobot's eager float32 policy are then measured in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from quantvla.evaluate.policy_bench import bench_policy
from quantvla.runtime.bench import bench
from quantvla.testing.smolvla import FULL_SIZE, SmolVLASize, write_random_checkpoint
from quantvla.versions import compiler_versions

SIZES = {"full": FULL_SIZE, "tiny": SmolVLASize()}
CALIBRATION_EPISODES, HELDOUT_FRAMES = 3, 4


@dataclass(frozen=True)
class Cost:
    """Wall time and peak resident memory of one command."""

    command: str
    wall_s: float
    peak_rss_gib: float


def write_set(directory: Path, size: SmolVLASize, frames: int) -> None:
    """Write ``frames`` random observations in three episodes, and a held-out fourth, as NPZ files."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(0)
    shape = (size.camera_height, size.camera_width, 3)
    for index in range(frames + HELDOUT_FRAMES):
        np.savez(
            directory / f"{index:04d}.npz",
            **{key: rng.integers(0, 256, shape, dtype=np.uint8) for key in size.cameras},
            **{"observation.state": rng.standard_normal(size.state_dim).astype(np.float32)},
            task="push the red block",
            episode=index * CALIBRATION_EPISODES // frames,
            frame=index,
        )


def run(*arguments: str) -> Cost:
    """Run a quantvla command and return what it took; its own messages go to stderr."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "quantvla", *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"quantvla {' '.join(arguments)}: failed")
    return Cost("quantvla " + arguments[0], time.monotonic() - start, _gib(usage))


def _gib(usage: resource.struct_rusage) -> float:
    return usage.ru_maxrss / 2**20


def compile_engines(work: Path, frames: int) -> list[Cost]:
    """Quantize and export; returns the cost of each command."""
    policy, quantized = str(work / "policy"), str(work / "w4a8")
    return [
        run("quantize", "--policy.path", policy, "--calib", str(work / "set"), "--frames", str(frames),
            "-o", quantized, "--overwrite"),
        run("export", quantized, "-o", str(work / "engines" / "w4a8"), "--overwrite"),
        run("export", policy, "-o", str(work / "engines" / "float"), "--overwrite"),
    ]  # fmt: skip


def measure(work: Path, rounds: int, repeats: int) -> dict[str, object]:
    """Return medians over ``rounds`` of p50 chunk and stage times and of memory, all arms in turns."""
    found: dict[str, list[dict[str, object]]] = {
        "lerobot eager float32": [],
        "float": [],
        "w4a8": [],
    }
    for _ in range(rounds):
        policy = bench_policy(work / "policy", repeats=repeats, warmup=1)
        found["lerobot eager float32"].append(_row(policy))
        for name in ("float", "w4a8"):
            found[name].append(_row(bench(work / "engines" / name, repeats=repeats, warmup=1)))
    return {
        name: {key: round(median(float(row[key]) for row in rows), 1) for key in rows[0]}  # type: ignore[arg-type]
        for name, rows in found.items()
    }


def _row(report: object) -> dict[str, object]:
    stages = {f"{name}_ms": times.p50 for name, times in report.stages.items()}  # type: ignore[attr-defined]
    return {
        "chunk_ms": report.chunk_ms.p50,  # type: ignore[attr-defined]
        **stages,
        "resident_mb": report.resident_mb,  # type: ignore[attr-defined]
        "peak_rss_mb": report.peak_rss_mb,  # type: ignore[attr-defined]
        "threads": report.threads,  # type: ignore[attr-defined]
    }


def main() -> None:
    """Build the checkpoint, compile it, measure, print tables and write the result as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--frames", type=int, default=64, help="calibration frames")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="chunks a round")
    parser.add_argument("--work", type=Path, default=Path("build/full_size"))
    parser.add_argument("-o", "--output", type=Path, default=Path("build/full_size/result.json"))
    options = parser.parse_args()
    size = SIZES[options.size]
    if not (options.work / "policy" / "model.safetensors").is_file():
        write_random_checkpoint(options.work / "policy", size)
    if not (options.work / "set").is_dir():
        write_set(options.work / "set", size, options.frames)
    costs = compile_engines(options.work, options.frames)
    result = {
        "size": options.size,
        "frames": options.frames,
        "compile": [asdict(cost) for cost in costs],
        "latency": measure(options.work, options.rounds, options.repeats),
        "engine_mb": {
            name: round(
                sum(p.stat().st_size for p in (options.work / "engines" / name).iterdir()) / 1e6, 1
            )
            for name in ("float", "w4a8")
        },
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": compiler_versions(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    show(result)


def show(result: dict[str, object]) -> None:
    """Print the compile costs and the latency table, with ratios to lerobot."""
    console = Console(width=120)
    table = Table(title=f"compiling, {result['frames']} calibration frames")
    for column in ("command", "wall s", "peak GiB"):
        table.add_column(column)
    for cost in result["compile"]:  # type: ignore[attr-defined]
        table.add_row(cost["command"], f"{cost['wall_s']:.0f}", f"{cost['peak_rss_gib']:.1f}")
    console.print(table)
    latency: dict[str, dict[str, float]] = result["latency"]  # type: ignore[assignment]
    reference = latency["lerobot eager float32"]["chunk_ms"]
    table = Table(title="one chunk, medians; ms and MiB")
    columns = list(next(iter(latency.values())))
    for column in ("arm", *columns, "speed-up"):
        table.add_column(column)
    for name, row in latency.items():
        table.add_row(
            name, *(f"{row[c]:.0f}" for c in columns), f"{reference / row['chunk_ms']:.2f}"
        )
    console.print(table)


if __name__ == "__main__":
    main()
