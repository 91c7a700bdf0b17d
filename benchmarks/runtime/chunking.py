"""Chunk strategies under injected delay in closed loop: success, and how the command steps at seams.

    python benchmarks/runtime/chunking.py build/engines/w4a8 -o benchmarks/runtime/chunking.json

The loop runs in virtual time: a chunk is there exactly ``delay`` ticks after it was asked for, on
any machine. All arms get the same goals and noise seeds. Without delay there is nothing to blend or
to continue, so only `sync` and `async` run there. `vjp` needs an engine exported with `--guidance`.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from episodes import TASKS, Condition, outcomes, pinned, run_conditions, summary
from rich.console import Console
from rich.table import Table

from quantvla.evaluate.statistics import PairCounts, mcnemar_p
from quantvla.runtime.control.spec import StrategySpec
from quantvla.runtime.manifest import read_manifest

ARMS = {
    "sync": StrategySpec(kind="sync"),
    "async": StrategySpec(kind="async"),
    "blend": StrategySpec(kind="blend"),
    "rtc prefix": StrategySpec(kind="rtc", guidance="prefix"),
    "rtc forward": StrategySpec(kind="rtc", guidance="forward"),
    "rtc vjp": StrategySpec(kind="rtc", guidance="vjp"),
}


def main() -> None:
    """Run all arms at all delays and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--delays", type=int, nargs="+", default=[0, 4, 8])
    parser.add_argument("--episodes", type=int, default=6)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no goal after so long")
    given = parser.parse_args()
    has_graph = read_manifest(given.engine).guidance is not None
    conditions = [
        Condition(f"{arm}, delay {delay}", str(given.engine), ARMS[arm], delay)
        for delay in given.delays
        for arm in given.arms
        if (has_graph or arm != "rtc vjp") and (delay or arm in ("sync", "async"))
    ]
    found = run_conditions(
        conditions,
        tasks=tuple(given.tasks),
        episodes=given.episodes,
        seed=given.seed,
        processes=given.processes,
        minutes=given.minutes,
    )
    baseline = found[conditions[0].name]
    arms = {}
    for condition in conditions:
        episodes = found[condition.name]
        both = [(a.solved, b.solved) for a, b in zip(baseline, episodes, strict=True)]
        pair = PairCounts(
            *(both.count(k) for k in ((True, True), (True, False), (False, True), (False, False)))
        )
        arms[condition.name] = summary(episodes) | {
            "against_first": {"only_first": pair.only_a, "only_this": pair.only_b,
                              "mcnemar_p": round(mcnemar_p(pair.only_a, pair.only_b), 4)},
            "outcomes": outcomes(episodes),
        }  # fmt: skip
    result = {
        "command": f"python benchmarks/runtime/chunking.py {pinned(given.engine)} --episodes {given.episodes} --seed {given.seed}",
        "engine": pinned(given.engine), "tasks": given.tasks, "seed": given.seed, "arms": arms,
    }  # fmt: skip
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    _print(result)


def _print(result: dict) -> None:  # type: ignore[type-arg]
    table = Table(title=f"{result['engine']}: success and steps of the command")
    columns = (
        "arm",
        "solved",
        "95 %",
        "ticks",
        "held",
        "seam p50",
        "seam p99",
        "inner p50",
        "p99",
        "ms",
    )
    for column in columns:
        table.add_column(column)
    for name, arm in result["arms"].items():
        low, high = arm["ci95"]
        table.add_row(
            name, f"{arm['solved']}/{arm['episodes']}", f"{low:.0%}-{high:.0%}", f"{arm['ticks_mean']:.0f}",
            f"{arm['held_share']:.0%}", *(f"{arm[k][p]:.3f}" for k in ("seam_step", "inner_step") for p in ("p50", "p99")),
            f"{arm['predict_ms']['mean']:.1f}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
