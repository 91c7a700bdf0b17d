"""Closed-loop comparison of policies: same episodes, same flow noise, in parallel, resumable.

For every (task, episode) all arms get the same environment seed and, chunk by chunk, the same
noise, so that they differ by the policy alone (``docs`` of the statistics: `results`, `statistics`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import quantvla
from quantvla.evaluate.arms import Arm, ChunkPolicy, load_policy
from quantvla.evaluate.environment import MetaWorld, Simulator, check_fit, select_tasks
from quantvla.evaluate.episode import environment_seed
from quantvla.evaluate.journal import EpisodeRecord, Header, Journal
from quantvla.evaluate.results import Evaluation, arm_results, pair_results
from quantvla.evaluate.workers import Item, Job, run_items
from quantvla.runtime.errors import explain

JOURNAL_FILE = "episodes.jsonl"
_VERSIONED = ("quantvla", "metaworld", "mujoco", "lerobot", "torch", "onnxruntime", "numpy")


@dataclass(frozen=True)
class EvaluationPlan:
    """What to run: ``episodes`` of every task with ``seed``.

    ``execute`` actions of a chunk and ``denoise_steps`` of the sampler are the policy's own when None.
    """

    tasks: tuple[str, ...]
    episodes: int
    seed: int = 0
    execute: int | None = None
    denoise_steps: int | None = None


def evaluate(
    arms: Sequence[Arm],
    plan: EvaluationPlan,
    *,
    processes: int | None = None,
    journal: Path | None = None,
    simulator: Simulator | None = None,
    load: Callable[[Arm], ChunkPolicy] = load_policy,
    progress: bool = True,
) -> Evaluation:
    """Run every arm on every (task, episode) of the plan and return the statistics.

    Episodes already in ``journal`` are not run again; new ones are added to it. The same arms,
    plan and versions give the same result with any number of processes and interruptions.
    Raises `QuantVLAError` for arms that do not fit the simulator or each other's names, unknown
    tasks, a journal of another evaluation, and a failing worker.
    """
    simulator = MetaWorld() if simulator is None else simulator
    plan = _checked(arms, plan, simulator)
    arms = [msgspec.structs.replace(arm, denoise_steps=plan.denoise_steps) for arm in arms]
    items = [Item(task, episode) for task in plan.tasks for episode in range(plan.episodes)]
    job = Job(tuple(arms), simulator, load, plan.seed, plan.execute)
    with _recorder(job, plan, journal) as recorder:
        done = {Item(r.task, r.episode): r for r in recorder.records}
        missing = [item for item in items if item not in done]
        if missing:
            simulator.check_installed()
            with _bar(len(items), len(items) - len(missing), arms, enabled=progress) as show:
                for record in run_items(job, missing, processes or available_cores()):
                    recorder.append(record)
                    done[Item(record.task, record.episode)] = record
                    show(record)
    return _summary(arms, plan, simulator, [done[item] for item in items])


def available_cores() -> int:
    """Return how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _checked(arms: Sequence[Arm], plan: EvaluationPlan, simulator: Simulator) -> EvaluationPlan:
    """Return the plan with its tasks in order, after checking it and the arms."""
    if not arms:
        raise explain("arms", "none given", remedy="name at least one, as NAME=DIRECTORY")
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise explain(
                "arms", "name used twice", got=repr(name), remedy="give every arm its own name"
            )
    if plan.episodes < 1:
        raise explain("episodes", "expected at least 1", got=plan.episodes, remedy="ask for more")
    environment_seed(plan.seed, plan.episodes - 1)
    tasks = select_tasks(simulator, plan.tasks)
    for arm in arms:
        check_fit(arm, simulator)
        if plan.execute is not None and not 1 <= plan.execute <= arm.contract.horizon:
            raise explain(
                f"execute for arm {arm.name}",
                f"expected 1 to {arm.contract.horizon} actions of a chunk",
                got=plan.execute,
                remedy="choose a number in that range",
            )
    return replace(plan, tasks=tasks)


@dataclass
class _Memory:
    """Stands in for the journal when none is wanted."""

    records: tuple[EpisodeRecord, ...] = ()

    def append(self, record: EpisodeRecord) -> None:
        self.records = (*self.records, record)


@contextmanager
def _recorder(job: Job, plan: EvaluationPlan, path: Path | None) -> Iterator[Journal | _Memory]:
    if path is None:
        yield _Memory()
        return
    header = Header(
        quantvla=quantvla.__version__,
        simulator=job.simulator.name,
        seed=job.seed,
        execute=job.execute,
        arms={arm.name: arm.sha256 for arm in job.arms},
        perturbation=job.simulator.perturbation.as_dict(),
        denoise_steps=plan.denoise_steps,
    )
    with Journal(path, header) as journal:
        yield journal


@contextmanager
def _bar(
    total: int, done: int, arms: Sequence[Arm], *, enabled: bool
) -> Iterator[Callable[[EpisodeRecord], None]]:
    """Yield a function to call with every finished episode; it moves the bar on stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rates]}"),
    )
    solved = {arm.name: 0 for arm in arms}
    with Progress(*columns, console=Console(stderr=True), disable=not enabled) as progress:
        task = progress.add_task("episodes", total=total, completed=done, rates="")
        seen = 0

        def show(record: EpisodeRecord) -> None:
            nonlocal seen
            seen += 1
            for name, outcome in record.outcomes.items():
                solved[name] += outcome.success
            rates = "  ".join(f"{name} {count / seen:.0%}" for name, count in solved.items())
            progress.update(task, advance=1, rates=rates)

        yield show


def _summary(
    arms: Sequence[Arm],
    plan: EvaluationPlan,
    simulator: Simulator,
    records: Sequence[EpisodeRecord],
) -> Evaluation:
    names = [arm.name for arm in arms]
    return Evaluation(
        arms=arm_results(records, names, plan.tasks),
        pairs=pair_results(records, names),
        simulator=simulator.name,
        tasks=plan.tasks,
        episodes_per_task=plan.episodes,
        seed=plan.seed,
        shared_noise=len({arm.contract.noise_shape for arm in arms}) == 1,
        sources={arm.name: f"{arm.kind} {arm.sha256}" for arm in arms},
        versions=_versions(),
        perturbation=simulator.perturbation.as_dict(),
        denoise_steps=plan.denoise_steps,
    )


def _versions() -> dict[str, str]:
    found = {"quantvla": quantvla.__version__}
    for name in _VERSIONED:
        try:
            found.setdefault(name, version(name))
        except PackageNotFoundError:
            continue
    return found
