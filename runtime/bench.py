"""Latency and memory of an engine, measured in a process that does nothing else."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata

import msgspec
import numpy as np

from quantvla.runtime.engine import Durations
from quantvla.runtime.errors import QuantVLAError, explain
from quantvla.runtime.machine import Memory, memory
from quantvla.runtime.policy import Policy


class Percentiles(msgspec.Struct, frozen=True):
    """Median and 99th percentile, in milliseconds."""

    p50: float
    p99: float


class BenchReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `bench` measured. Memory is in MiB, None where the system does not tell.

    ``stages`` are the times of one run of each stage (``denoise``: one step); ``loop_ms`` is the
    sum of all denoise steps of a chunk, ``runs`` how often each stage runs in it. ``resident_mb`` is after the last chunk, of which
    ``anonymous_mb`` is not backed by a file, and ``before_load_mb`` was there before the engine.
    """

    chunk_ms: Percentiles
    stages: dict[str, Percentiles]
    peak_rss_mb: float | None
    resident_mb: float | None
    threads: int
    versions: dict[str, str]
    anonymous_mb: float | None
    before_load_mb: float | None
    preprocess_ms: Percentiles
    loop_ms: Percentiles
    denoise_steps: int
    load_ms: float
    first_chunk_ms: float
    repeats: int
    warmup: int
    family: str
    recipe: str
    target: str
    runs: dict[str, int] = {}


def bench(
    directory: str | os.PathLike[str],
    *,
    repeats: int = 50,
    warmup: int = 5,
    threads: int | None = None,
) -> BenchReport:
    """Return latency and memory of an engine directory, measured in a fresh child process.

    ``warmup`` chunks run before the ``repeats`` that count. The observation is random and fixed.
    Raises `QuantVLAError` with the child's message if the engine cannot be run.
    """
    if repeats < 1 or warmup < 0:
        raise explain(
            "bench",
            "expected repeats >= 1 and warmup >= 0",
            got=f"{repeats} and {warmup}",
            remedy="change them",
        )
    command = [sys.executable, "-m", __name__, os.fspath(directory), str(repeats), str(warmup)]
    if threads is not None:
        command += ["--threads", str(threads)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode == 2:
        raise QuantVLAError(child.stderr.strip())
    if child.returncode != 0:
        raise explain(
            directory,
            f"the measuring process failed with status {child.returncode}",
            got=child.stderr.strip().splitlines()[-1:] or "no message",
            remedy="check that there is enough memory for the engine",
        )
    return msgspec.json.decode(child.stdout, type=BenchReport)


def measure(directory: str, repeats: int, warmup: int, threads: int | None) -> BenchReport:
    """Return the report of an engine directory, measured in this process."""
    before = memory()
    start_ns = time.perf_counter_ns()
    with Policy.from_pretrained(directory, threads=threads) as policy:
        load_ms = _milliseconds(time.perf_counter_ns() - start_ns)
        obs = _random_observation(policy)
        start_ns = time.perf_counter_ns()
        policy.predict_action_chunk(obs, seed=0)
        first_chunk_ms = _milliseconds(time.perf_counter_ns() - start_ns)
        for _ in range(warmup):
            policy.predict_action_chunk(obs, seed=0)
        with policy.timing() as durations:
            for seed in range(repeats):
                policy.predict_action_chunk(obs, seed=seed)
        return _report(
            policy, durations, before, load_ms=load_ms, first_chunk_ms=first_chunk_ms, warmup=warmup
        )


def _report(
    policy: Policy,
    durations: Durations,
    before: Memory | None,
    *,
    load_ms: float,
    first_chunk_ms: float,
    warmup: int,
) -> BenchReport:
    manifest = policy.manifest
    after = memory()
    steps = len(manifest.sampler.timesteps)
    repeats = len(durations["chunk"])
    loops = np.array(durations[manifest.sampler.stage]).reshape(repeats, steps).sum(axis=1)
    return BenchReport(
        chunk_ms=_percentiles(durations["chunk"]),
        stages={stage.name: _percentiles(durations[stage.name]) for stage in manifest.stages},
        peak_rss_mb=round(after.peak_rss_mb, 1) if after else None,
        resident_mb=round(after.resident_mb, 1) if after else None,
        threads=policy.threads,
        versions=_versions(policy),
        anonymous_mb=round(after.anonymous_mb, 1) if after else None,
        before_load_mb=round(before.resident_mb, 1) if before else None,
        preprocess_ms=_percentiles(durations["preprocess"]),
        loop_ms=_percentiles(loops.tolist()),
        denoise_steps=steps,
        load_ms=load_ms,
        first_chunk_ms=first_chunk_ms,
        repeats=repeats,
        warmup=warmup,
        family=manifest.family,
        recipe=manifest.recipe,
        target=manifest.target,
        runs={stage.name: stage.repeat for stage in manifest.stages},
    )


def _versions(policy: Policy) -> dict[str, str]:
    """Return what the numbers depend on: this package, Python, numpy, the engine library, the system."""
    return {
        "quantvla": _installed("quantvla"),
        "python": platform.python_version(),
        "numpy": np.__version__,
        **policy.versions,
        "platform": platform.platform(),
    }


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed (run from its source)"


def _random_observation(policy: Policy) -> dict[str, object]:
    """Return the policy's blank observation with noise for images, the same each time."""
    rng = np.random.default_rng(0)
    obs = policy.blank_observation()
    for camera in policy.manifest.cameras:
        obs[camera.key] = rng.integers(0, 256, (camera.height, camera.width, 3), dtype=np.uint8)
    return obs


def _percentiles(durations_ns: Sequence[int]) -> Percentiles:
    p50, p99 = np.percentile(durations_ns, (50, 99))
    return Percentiles(_milliseconds(p50), _milliseconds(p99))


def _milliseconds(duration_ns: float) -> float:
    return round(float(duration_ns) / 1e6, 4)


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory")
    parser.add_argument("repeats", type=int)
    parser.add_argument("warmup", type=int)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    try:
        report = measure(options.directory, options.repeats, options.warmup, options.threads)
    except QuantVLAError as error:
        print(error, file=sys.stderr)
        return 2
    print(msgspec.json.encode(report).decode())
    return 0


if __name__ == "__main__":
    sys.exit(_main())
