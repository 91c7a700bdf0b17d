"""Find the harder test bed: the largest perturbation that the float policy still masters.

    python benchmarks/fidelity/sweep.py                # all kinds; about ten minutes on two cores
    python benchmarks/fidelity/sweep.py --kinds camera

First the tasks that the float policy solves at all are found (at least --master of the episodes, 60 %).
On these every kind of perturbation is made stronger step by step until less than --master of the
episodes succeed. The bed is the last step before that, of the kind --bed (the others are reported).
The result, with every rate, is written to hard_bed.json beside this file; run.py reads it.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec
from arm_result import REFERENCE
from beds import BedSpec
from compiling import export_arm, float_key
from rich.console import Console
from rich.table import Table

from quantvla.evaluate.arms import Arm, identify_arm
from quantvla.evaluate.closed_loop import EvaluationPlan, available_cores, evaluate
from quantvla.evaluate.environment import MetaWorld
from quantvla.evaluate.perturbation import UNCHANGED, Perturbation
from quantvla.evaluate.results import ArmResult, TaskResult
from quantvla.runtime.errors import QuantVLAError, explain
from quantvla.runtime.files import sha256_tree, write_atomic

HERE = Path(__file__).parent
LADDERS: dict[str, tuple[float, ...]] = {
    "camera": (0.02, 0.04, 0.06, 0.09, 0.13, 0.2),
    "light": (0.25, 0.5, 1.0, 2.0),
    "goals": (0.1, 0.2, 0.4, 0.7, 1.0),
    "actions": (0.25, 0.5, 0.75, 1.0, 1.5),
    "steps": (4, 2, 1),
}
"""Strengths by kind, from weak to strong; ``steps`` are denoise steps."""


class Rung(msgspec.Struct, frozen=True, kw_only=True):
    """Success of the float policy at one strength."""

    kind: str
    strength: float
    success: TaskResult


class Sweep(msgspec.Struct, frozen=True, kw_only=True):
    """The content of ``hard_bed.json``. ``chosen``: the float policy's success on the bed."""

    bed: BedSpec
    chosen: TaskResult
    kind: str
    master: float
    plain: dict[str, TaskResult]
    rungs: tuple[Rung, ...]
    episodes_per_task: int
    seed: int
    source_sha256: str


@dataclass(frozen=True)
class Sweeper:
    """Evaluates the float engine, with a journal for every rung."""

    arm: Arm
    work: Path
    episodes: int
    seed: int
    processes: int

    def run(self, bed: BedSpec) -> ArmResult:
        """Return the float engine's success on a bed."""
        print(f"{bed.name}: {self.episodes} episodes of {', '.join(bed.tasks)}", file=sys.stderr)
        result = evaluate(
            [self.arm],
            EvaluationPlan(bed.tasks, self.episodes, self.seed, None, bed.denoise_steps),
            processes=self.processes,
            journal=self.work / f"{bed.name}-{self.arm.sha256[:12]}.jsonl",
            simulator=MetaWorld(bed.perturbation),
        )
        return result.arms[self.arm.name]

    def climb(self, kind: str, tasks: tuple[str, ...], master: float) -> list[Rung]:
        """Return the rungs of a kind up to the first that is not mastered."""
        rungs: list[Rung] = []
        for strength in LADDERS[kind]:
            success = total(self.run(bed_of(kind, strength, tasks)))
            rungs.append(Rung(kind=kind, strength=strength, success=success))
            if success.rate < master:
                break
        return rungs


def bed_of(kind: str, strength: float, tasks: tuple[str, ...]) -> BedSpec:
    """Return the bed of one rung."""
    name = f"{kind}-{strength:g}"
    if kind == "steps":
        return BedSpec(name=name, tasks=tasks, denoise_steps=int(strength))
    return BedSpec(name=name, tasks=tasks, perturbation=Perturbation(**{kind: strength}))


def total(result: ArmResult) -> TaskResult:
    """Return the success over all tasks."""
    return TaskResult(
        episodes=result.episodes,
        successes=result.successes,
        rate=result.rate,
        ci95=result.ci95,
    )


def choose(rungs: list[Rung], kind: str, master: float) -> Rung:
    """Return the strongest mastered rung of a kind. Raises `QuantVLAError` if the first is too strong already."""
    mastered = [rung for rung in rungs if rung.kind == kind and rung.success.rate >= master]
    if not mastered:
        raise explain(f"--bed {kind}", "the float policy masters no step of it", remedy="take another kind, or weaker steps")  # fmt: skip
    return mastered[-1]


def print_sweep(sweep: Sweep) -> None:
    """Print every rung."""
    table = Table(title=f"float policy on {', '.join(sweep.bed.tasks)}")
    for column in ("kind", "strength", "success", "95 %"):
        table.add_column(column)
    for rung in sweep.rungs:
        low, high = rung.success.ci95
        table.add_row(
            rung.kind, f"{rung.strength:g}", f"{rung.success.rate:.0%}", f"{low:.0%} {high:.0%}"
        )
    Console().print(table)
    Console().print(f"hard bed: {sweep.kind}, success {sweep.chosen.rate:.0%}")


def main() -> None:
    """Sweep and write the bed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("examples/metaworld/policy"))
    parser.add_argument("--kinds", default=",".join(LADDERS))
    parser.add_argument("--bed", default="camera", help="kind that becomes the bed")
    parser.add_argument("--master", type=float, default=0.6)
    parser.add_argument("--episodes", type=int, default=8, help="per task and step")
    parser.add_argument("--seed", type=int, default=50, help="not that of run.py: the bed is chosen on other episodes")  # fmt: skip
    parser.add_argument("--processes", type=int, default=available_cores())
    parser.add_argument("--work", type=Path, default=Path("build/fidelity"))
    parser.add_argument("-o", "--output", type=Path, default=HERE / "hard_bed.json")
    options = parser.parse_args()
    source = sha256_tree(options.checkpoint)
    engine = options.work / "engines" / REFERENCE
    export_arm(options.checkpoint, engine, float_key(source))
    sweeper = Sweeper(
        identify_arm(REFERENCE, engine), options.work / "sweep", options.episodes, options.seed,
        options.processes,
    )  # fmt: skip
    plain = sweeper.run(BedSpec(name="plain", tasks=("all",), perturbation=UNCHANGED)).tasks
    tasks = tuple(task for task, found in plain.items() if found.rate >= options.master)
    rungs: list[Rung] = []
    for kind in dict.fromkeys([options.bed, *options.kinds.split(",")]):
        rungs += sweeper.climb(kind, tasks, options.master)
    rung = choose(rungs, options.bed, options.master)
    sweep = Sweep(
        bed=msgspec.structs.replace(bed_of(rung.kind, rung.strength, tasks), name="hard"),
        chosen=rung.success, kind=rung.kind, master=options.master, plain=plain,
        rungs=tuple(rungs), episodes_per_task=options.episodes, seed=options.seed,
        source_sha256=source,
    )  # fmt: skip
    write_atomic(options.output, msgspec.json.format(msgspec.json.encode(sweep), indent=1) + b"\n")
    print_sweep(sweep)


if __name__ == "__main__":
    try:
        main()
    except QuantVLAError as error:
        sys.exit(f"error: {error}")
