"""What fewer denoise steps cost and save: action error of equal and of fitted times, and time of a chunk.

    python benchmarks/cpu/schedule.py --policy examples/metaworld/policy --calib calib_sets/metaworld \
        --engine ENGINE --fits build/schedules

ENGINE is one of the policy, exported with its own number of steps; its chunks are timed with fewer in
turns. Fits are kept and used again. Prints the table of docs/performance.md.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import msgspec

from quantvla.calib_sets import open_set
from quantvla.families import load_policy
from quantvla.families.base import LoadedPolicy
from quantvla.runtime.files import write_atomic
from quantvla.runtime.policy import Policy
from quantvla.schedule import ChunkErrors, Schedule, read_schedule
from quantvla.schedule_fit import fit_schedule

STEPS = (6, 4, 3, 2)
ROUNDS = 40


def main() -> None:
    """Fit what is missing, time, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("policy", "calib", "engine", "fits"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--heldout-frames", type=int, default=64)
    options = parser.parse_args()
    options.fits.mkdir(parents=True, exist_ok=True)
    loaded: LoadedPolicy | None = None
    found: list[Schedule] = []
    for steps in STEPS:
        path = options.fits / f"{steps}.json"
        if not path.exists():
            loaded = loaded or load_policy(options.policy)
            schedule = fit_schedule(
                loaded, open_set(options.calib), steps, frames=options.frames,
                heldout_frames=options.heldout_frames, seed=0,
            )  # fmt: skip
            write_atomic(path, msgspec.json.format(msgspec.json.encode(schedule), indent=1))
        found.append(read_schedule(path))
    times = chunk_ms(options.engine, (found[0].own_steps, *STEPS))
    print(f"{found[0].heldout_frames} held-out frames; fitted on {found[0].frames}")
    print("| steps | times | nrmse | mean of frames | median of frames | chunk ms |")
    print("|---|---|---|---|---|---|")
    print(f"| {found[0].own_steps} | equal | 0 | 0 | 0 | {times[0]:.1f} |")
    for schedule, duration in zip(found, times[1:], strict=True):
        judged = schedule.on_heldout
        print(f"| {schedule.steps} | equal | {_row(judged.equal)} | {duration:.1f} |")
        inner = " ".join(f"{t:.3f}" for t in schedule.times[:-1])
        print(f"| | fitted: {inner} | {_row(judged.fitted)} | |")


def _row(error: ChunkErrors) -> str:
    return f"{error.nrmse:.2%} | {error.mean:.2%} | {error.median:.2%}"


def chunk_ms(engine: Path, steps: tuple[int, ...]) -> list[float]:
    """Return the median milliseconds of a chunk with each number of steps, taken in turns."""
    samples: list[list[float]] = [[] for _ in steps]
    with Policy.from_pretrained(engine) as policy:
        obs = policy.blank_observation()
        for turn in range(ROUNDS + 3):
            for number, found in zip(steps, samples, strict=True):
                start = time.perf_counter()
                policy.predict_action_chunk(obs, seed=turn, steps=number)
                found.append(1e3 * (time.perf_counter() - start))
    return [median(found[3:]) for found in samples]


if __name__ == "__main__":
    main()
