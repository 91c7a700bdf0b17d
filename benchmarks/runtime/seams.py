"""How far two chunks disagree where one takes over from the other, on recorded observations.

    python benchmarks/runtime/seams.py build/engines/w4a8 -o benchmarks/runtime/seams.json

Both chunks come from the same held-out observation with other noise, so what they disagree by is
the noise alone; the new one takes over after ``delay`` ticks. Nothing here depends on the
machine's speed or load.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from episodes import pinned
from rich.console import Console
from rich.table import Table

from quantvla.calib_sets import Observation, open_set
from quantvla.runtime.guidance import ActionPrefix, Method
from quantvla.runtime.policy import Policy

ARMS: dict[str, Method | None] = {"async": None, "rtc prefix": "prefix", "rtc forward": "forward", "rtc vjp": "vjp"}  # fmt: skip


def main() -> None:
    """Compare the arms and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--set", type=Path, default=Path("calib_sets/metaworld"))
    parser.add_argument("--delays", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--frames", type=int, default=32)
    given = parser.parse_args()
    with Policy.from_pretrained(given.engine, threads=1) as policy:
        heldout = open_set(given.set).part("heldout")
        step = max(len(heldout) // given.frames, 1)
        frames = [heldout[index].observation for index in range(0, len(heldout), step)]
        arms = {n: m for n, m in ARMS.items() if m != "vjp" or policy.manifest.guidance is not None}
        if "rtc vjp" in arms:
            policy.load_guidance()
        rows = {
            f"{name}, delay {delay}": _measure(policy, frames, method, delay)
            for delay in given.delays
            for name, method in arms.items()
        }
    result = {
        "command": f"python benchmarks/runtime/seams.py {pinned(given.engine)} --frames {given.frames}",
        "engine": pinned(given.engine), "frames": len(frames), "arms": rows,
    }  # fmt: skip
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    table = Table(title=f"{len(frames)} seams, normalized units, RMS over action entries")
    for column in (
        "arm",
        "disagreement mean",
        "p90",
        "step at the seam mean",
        "p90",
        "step of the old chunk there",
    ):
        table.add_column(column)
    for name, row in rows.items():
        table.add_row(name, *(f"{row[key]:.4f}" for key in row))
    Console().print(table)


def _measure(
    policy: Policy, frames: list[Observation], method: Method | None, delay: int
) -> dict[str, float]:
    disagreement, step, usual = [], [], []
    for index, observation in enumerate(frames):
        old = policy.predict_action_chunk(observation, seed=2 * index)
        prefix = None if method is None else ActionPrefix(old, delay, method=method)
        new = policy.predict_action_chunk(observation, seed=2 * index + 1, prefix=prefix)
        a, b = (policy.postprocessor.normalize(chunk) for chunk in (old, new))
        disagreement.append(_rms(b[:delay] - a[:delay]))
        step.append(_rms(b[delay] - a[delay - 1]))
        usual.append(_rms(a[delay] - a[delay - 1]))
    return {
        "disagreement_mean": _round(np.mean(disagreement)),
        "disagreement_p90": _round(np.percentile(disagreement, 90)),
        "seam_step_mean": _round(np.mean(step)),
        "seam_step_p90": _round(np.percentile(step, 90)),
        "inner_step_mean": _round(np.mean(usual)),
    }


def _rms(difference: Any) -> float:
    return float(np.sqrt(np.mean(np.square(difference))))


def _round(value: Any) -> float:
    return round(float(value), 5)


if __name__ == "__main__":
    main()
