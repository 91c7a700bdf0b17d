"""Success against mean inference time of a cascade, beside its two levels alone.

    python benchmarks/runtime/cascade.py build/engines/w4a8 -o benchmarks/runtime/cascade.json

The cheap level takes few denoise steps, the better one the policy's own number; thresholds are
calibrated on the calibration part of the bundled set, the episodes are of other goals.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from episodes import TASKS, Condition, outcomes, pinned, run_conditions, summary
from rich.console import Console
from rich.table import Table

from quantvla.calib_sets import open_set
from quantvla.runtime.control.cascade import Level, calibrate_threshold
from quantvla.runtime.control.spec import CascadeSpec, StrategySpec
from quantvla.runtime.policy import Policy

SYNC = StrategySpec(kind="sync")


def main() -> None:
    """Calibrate thresholds, run the arms and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--set", type=Path, default=Path("calib_sets/metaworld"))
    parser.add_argument("--frames", type=int, default=96)
    parser.add_argument("--steps", type=int, default=1, help="denoise steps of the cheap level")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--episodes", type=int, default=6)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no goal after so long")
    given = parser.parse_args()
    thresholds = _thresholds(given)
    never, always = CascadeSpec(threshold=1e9, steps=given.steps, samples=2), None
    specs: dict[str, CascadeSpec | None] = {
        "better level alone": always,
        f"cheap level alone ({given.steps} steps, 2 samples)": never,
    }
    for share, threshold in thresholds.items():
        specs[f"cascade, {share:.0%} escalated in calibration"] = CascadeSpec(
            threshold=threshold, steps=given.steps, samples=given.samples
        )
    conditions = [Condition(n, str(given.engine), SYNC, cascade=s) for n, s in specs.items()]
    found = run_conditions(
        conditions,
        tasks=tuple(given.tasks),
        episodes=given.episodes,
        seed=given.seed,
        processes=given.processes,
        minutes=given.minutes,
    )
    result = {
        "command": f"python benchmarks/runtime/cascade.py {pinned(given.engine)} --steps {given.steps} "
        f"--samples {given.samples} --episodes {given.episodes} --seed {given.seed}",
        "engine": pinned(given.engine), "tasks": given.tasks, "seed": given.seed,
        "thresholds": {f"{share:g}": round(value, 5) for share, value in thresholds.items()},
        "arms": {n: summary(e) | {"outcomes": outcomes(e)} for n, e in found.items()},
    }  # fmt: skip
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    table = Table(title="Success against inference time, one thread")
    for column in ("arm", "solved", "95 %", "mean ms", "p99 ms", "escalated"):
        table.add_column(column)
    for name, arm in result["arms"].items():
        low, high = arm["ci95"]
        table.add_row(
            name, f"{arm['solved']}/{arm['episodes']}", f"{low:.0%}-{high:.0%}",
            f"{arm['predict_ms']['mean']:.1f}", f"{arm['predict_ms']['p99']:.1f}", f"{arm['escalated_share']:.0%}",
        )  # fmt: skip
    Console().print(table)


def _thresholds(given: argparse.Namespace) -> dict[float, float]:
    calibration = open_set(given.set).part("calibration")
    step = max(len(calibration) // given.frames, 1)
    frames = [calibration[i].observation for i in range(0, len(calibration), step)]
    with Policy.from_pretrained(given.engine, threads=1) as policy:
        rows = policy.manifest.action.execute
        level = Level(policy, given.steps)
        return {
            share: calibrate_threshold(level, frames, rows=rows, share=share, samples=given.samples)
            for share in given.shares
        }


if __name__ == "__main__":
    main()
