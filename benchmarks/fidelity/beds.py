"""The arms in closed loop: a journal per bed and arm, so that the float arm's episodes serve every pair."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
from arm_result import Bed

from quantvla.evaluate.arms import Arm
from quantvla.evaluate.closed_loop import EvaluationPlan, evaluate
from quantvla.evaluate.combine import join_journals
from quantvla.evaluate.environment import MetaWorld
from quantvla.evaluate.perturbation import Perturbation
from quantvla.evaluate.results import PairResult, TaskResult, pair_results
from quantvla.runtime.errors import explain


class BedSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One test bed: the tasks, and how they are changed."""

    name: str
    tasks: tuple[str, ...] = ("all",)
    perturbation: Perturbation = Perturbation()
    denoise_steps: int | None = None


REFERENCE_BED = BedSpec(name="reference")


def read_bed(path: Path) -> BedSpec:
    """Return the bed that a sweep chose."""
    if not path.is_file():
        raise explain(
            path, "no such bed", remedy="find it first: python benchmarks/fidelity/sweep.py"
        )
    return msgspec.json.decode(path.read_bytes(), type=_Swept).bed


class _Swept(msgspec.Struct):
    bed: BedSpec


@dataclass(frozen=True)
class ClosedLoop:
    """Where and how much: journals below ``work``, ``processes`` workers; ``reference`` is the float arm."""

    work: Path
    reference: Arm
    seed: int = 0
    processes: int | None = None

    def run(self, arm: Arm, bed: BedSpec, episodes_per_task: int) -> Bed:
        """Run the arm's missing episodes and return its result, paired with the float arm's so far."""
        path = self._journal(bed, arm)
        before = _episodes(path)
        start = time.monotonic()
        evaluation = evaluate(
            [arm],
            EvaluationPlan(bed.tasks, episodes_per_task, self.seed, None, bed.denoise_steps),
            processes=self.processes,
            journal=path,
            simulator=MetaWorld(bed.perturbation),
        )
        minutes, ran = (time.monotonic() - start) / 60, _episodes(path) - before
        found = evaluation.arms[arm.name]
        return Bed(
            perturbation=bed.perturbation.as_dict(),
            denoise_steps=bed.denoise_steps,
            seed=self.seed,
            success=TaskResult(
                episodes=found.episodes,
                successes=found.successes,
                rate=found.rate,
                ci95=found.ci95,
            ),
            tasks=found.tasks,
            pair=self._pair(arm, bed),
            smoothness=found.smoothness,
            arm_sha256=arm.sha256,
            episodes_per_minute=round(ran / minutes, 1) if ran else None,
        )

    def _pair(self, arm: Arm, bed: BedSpec) -> PairResult | None:
        reference = self._journal(bed, self.reference)
        if arm == self.reference or not reference.is_file():
            return None
        records = join_journals([reference, self._journal(bed, arm)])
        (pair,) = pair_results(records, [self.reference.name, arm.name])
        return pair

    def _journal(self, bed: BedSpec, arm: Arm) -> Path:
        return self.work / bed.name / f"{arm.name}-{arm.sha256[:12]}.jsonl"


def _episodes(path: Path) -> int:
    """Return how many episodes a journal has; its first line is the header."""
    return max(0, len(path.read_bytes().splitlines()) - 1) if path.is_file() else 0
