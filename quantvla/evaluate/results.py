"""Results of an evaluation: success of every arm and task, and what every pair of arms differs by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

import msgspec

from quantvla.evaluate.journal import EpisodeRecord
from quantvla.evaluate.statistics import (
    PairCounts,
    mcnemar_p,
    paired_difference,
    wilson_interval,
)
from quantvla.fidelity.smoothness import Smoothness, pool


class TaskResult(msgspec.Struct, frozen=True, kw_only=True):
    """Success on one task, with Wilson's 95 % interval."""

    episodes: int
    successes: int
    rate: float
    ci95: tuple[float, float]


class ArmResult(msgspec.Struct, frozen=True, kw_only=True):
    """Success of one arm over all tasks and on each; ``mean_steps`` counts the solved episodes only.

    ``smoothness`` is that of the executed actions, physical units.
    """

    episodes: int
    successes: int
    rate: float
    ci95: tuple[float, float]
    mean_steps: float | None
    smoothness: Smoothness | None = None
    tasks: dict[str, TaskResult]


class PairResult(msgspec.Struct, frozen=True, kw_only=True):
    """Two arms on the same episodes. ``difference`` is rate(b) - rate(a), with Newcombe's 95 % interval."""

    a: str
    b: str
    both: int
    only_a: int
    only_b: int
    neither: int
    difference: float
    ci95: tuple[float, float]
    mcnemar_p: float


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `quantvla eval`; its JSON is what ``--json`` prints."""

    arms: dict[str, ArmResult]
    pairs: tuple[PairResult, ...]
    simulator: str
    tasks: tuple[str, ...]
    episodes_per_task: int
    seed: int
    shared_noise: bool
    sources: dict[str, str]
    versions: dict[str, str]
    perturbation: dict[str, float] = {}
    denoise_steps: int | None = None


def arm_results(
    records: Sequence[EpisodeRecord], names: Sequence[str], tasks: Sequence[str]
) -> dict[str, ArmResult]:
    """Return the success of every arm, tasks in the given order."""
    return {name: _arm_result(records, name, tasks) for name in names}


def pair_results(records: Sequence[EpisodeRecord], names: Sequence[str]) -> tuple[PairResult, ...]:
    """Return the comparison of every pair of arms, the earlier named one as ``a``."""
    return tuple(_pair_result(records, a, b) for a, b in combinations(names, 2))


def _arm_result(records: Sequence[EpisodeRecord], name: str, tasks: Sequence[str]) -> ArmResult:
    by_task = {
        task: _task_result(r.outcomes[name].success for r in records if r.task == task)
        for task in tasks
    }
    total = _task_result(record.outcomes[name].success for record in records)
    outcomes = [record.outcomes[name] for record in records]
    steps = [outcome.steps for outcome in outcomes if outcome.success]
    motions = [outcome.smoothness for outcome in outcomes if outcome.smoothness is not None]
    return ArmResult(
        episodes=total.episodes,
        successes=total.successes,
        rate=total.rate,
        ci95=total.ci95,
        mean_steps=sum(steps) / len(steps) if steps else None,
        smoothness=pool(motions) if motions else None,
        tasks=by_task,
    )


def _task_result(successes: Iterable[bool]) -> TaskResult:
    outcomes = list(successes)
    solved = sum(outcomes)
    return TaskResult(
        episodes=len(outcomes),
        successes=solved,
        rate=solved / len(outcomes) if outcomes else 0.0,
        ci95=wilson_interval(solved, len(outcomes)),
    )


def _pair_result(records: Sequence[EpisodeRecord], a: str, b: str) -> PairResult:
    outcomes = [(r.outcomes[a].success, r.outcomes[b].success) for r in records]
    counts = PairCounts(
        both=outcomes.count((True, True)),
        only_a=outcomes.count((True, False)),
        only_b=outcomes.count((False, True)),
        neither=outcomes.count((False, False)),
    )
    difference = paired_difference(counts)
    return PairResult(
        a=a,
        b=b,
        both=counts.both,
        only_a=counts.only_a,
        only_b=counts.only_b,
        neither=counts.neither,
        difference=difference.value,
        ci95=(difference.low, difference.high),
        mcnemar_p=mcnemar_p(counts.only_a, counts.only_b),
    )
