"""Meta-World episodes through the control loop in virtual time, for the benchmarks beside this file."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from quantvla.evaluate.environment import Environment, MetaWorld
from quantvla.evaluate.statistics import wilson_interval
from quantvla.robots.metaworld import RELATIVE_ACTIONS, MetaWorldRobot
from quantvla.runtime.control.clock import VirtualClock
from quantvla.runtime.control.guard import MotionGuard
from quantvla.runtime.control.limits import limits_from_manifest
from quantvla.runtime.control.loop import ControlLoop, LoopOptions
from quantvla.runtime.control.spec import CascadeSpec, StrategySpec, build_cascade, build_strategy
from quantvla.runtime.control.strategy import Strategy
from quantvla.runtime.control.trace import Record, TickRecord
from quantvla.runtime.control.watchdog import WatchdogOptions
from quantvla.runtime.control.worker import DelayedWorker
from quantvla.runtime.policy import Policy

RATE_HZ = 50.0
TASKS = (
    "push-v3", "pick-place-v3", "door-open-v3", "drawer-open-v3", "drawer-close-v3",
    "button-press-topdown-v3", "window-open-v3", "window-close-v3",
)  # fmt: skip
"""The tasks that the reference policy solves in at least nine of ten episodes: reach, at one of two, would only dilute a difference."""


@dataclass(frozen=True)
class Condition:
    """What differs between arms. ``steps``: denoise steps of a chunk, None for the policy's own."""

    name: str
    engine: str
    strategy: StrategySpec
    delay_ticks: int = 0
    cascade: CascadeSpec | None = None


@dataclass(frozen=True)
class Episode:
    """How one went. Steps are RMS changes of the command from tick to tick, at chunk seams and elsewhere."""

    task: str
    episode: int
    solved: bool
    ticks: int
    held: int
    seam_steps: list[float]
    inner_steps: list[float]
    predict_ms: list[float]
    escalated: int = 0


@dataclass
class MemoryTrace:
    """Keeps the ticks of a run."""

    ticks: list[TickRecord] = field(default_factory=list)

    def write(self, record: Record, observation: Mapping[str, object] | None = None) -> None:
        """Keep a tick."""
        if isinstance(record, TickRecord):
            self.ticks.append(record)

    def lost(self) -> int:
        """Return 0."""
        return 0


class OneSimulator(MetaWorld):
    """Meta-World that builds every task once in a process."""

    def open(self, task: str, *, image_size: int | None = None) -> Environment:
        """Return the task's environment."""
        return _environment(task)


@cache
def _environment(task: str) -> Environment:
    return MetaWorld().open(task)


@cache
def _policy(engine: str) -> Policy:
    policy = Policy.from_pretrained(engine, threads=1)
    policy.warm_up(2)
    return policy


def run_episode(condition: Condition, task: str, episode: int, seed: int) -> Episode:
    """Return how one episode goes under a condition; the same every time but for ``predict_ms``."""
    policy = _policy(condition.engine)
    manifest = policy.manifest
    cascade = None
    if condition.cascade is not None:
        better = condition.cascade.engine
        other = policy if better is None else _policy(str(better))
        cascade = build_cascade(condition.cascade, policy, other, manifest.action.execute)
    strategy = build_strategy(condition.strategy, policy, cascade)
    predict_ms: list[float] = []
    trace = MemoryTrace()
    robot = MetaWorldRobot(
        task,
        seed=seed,
        episode=episode,
        keys=manifest.observation_keys,
        simulator=OneSimulator(),
    )
    loop = ControlLoop(
        robot,
        strategy,
        rate_hz=RATE_HZ,
        guard=MotionGuard(
            limits_from_manifest(manifest, RELATIVE_ACTIONS), RATE_HZ, kill_after=None
        ),
        options=LoopOptions(observe_every_tick=False),
        watchdog=WatchdogOptions(robot_s=60.0),
        trace=trace,
        clock=VirtualClock(),
        worker=lambda s: DelayedWorker(_timed(s, predict_ms), condition.delay_ticks),
        seed=seed * 1000 + episode,
    )
    report = loop.run()
    seams, inner = _steps(trace.ticks)
    escalated = 0 if cascade is None else cascade.counts.escalated
    return Episode(
        task, episode, robot.solved, robot.steps, report.held, seams, inner, predict_ms, escalated
    )


def _timed(strategy: Strategy, into: list[float]) -> Any:
    def predict(request: Any) -> Any:
        start_s = time.perf_counter()
        chunk = strategy.predict(request)
        into.append((time.perf_counter() - start_s) * 1e3)
        return chunk

    return predict


def _steps(ticks: list[TickRecord]) -> tuple[list[float], list[float]]:
    """Return the RMS changes of the command at seams and elsewhere, of ticks that were not held."""
    seams, inner = [], []
    for before, after in itertools.pairwise(ticks):
        if before.sent is None or after.planned is None:
            continue
        step = float(np.sqrt(np.mean((np.array(after.planned) - np.array(before.sent)) ** 2)))
        (seams if after.inference != before.inference else inner).append(step)
    return seams, inner


def run_conditions(
    conditions: list[Condition],
    *,
    tasks: tuple[str, ...],
    episodes: int,
    seed: int,
    processes: int,
    minutes: float,
) -> dict[str, list[Episode]]:
    """Return the episodes of every condition: the same goals for all.

    Goals are begun, one of each task after the other, until ``minutes`` have passed: all
    conditions have run on every goal that is returned.
    """
    found: dict[str, list[Episode]] = {condition.name: [] for condition in conditions}
    end_s = time.monotonic() + minutes * 60
    goals = [(task, episode) for episode in range(episodes) for task in tasks]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for task, episode in track(goals, description="goals"):
            if time.monotonic() > end_s:
                break
            futures = [pool.submit(run_episode, c, task, episode, seed) for c in conditions]
            for condition, future in zip(conditions, futures, strict=True):
                found[condition.name].append(future.result())
    return found


def summary(episodes: list[Episode]) -> dict[str, Any]:
    """Return success with its interval, steps of the command, and what inference cost."""
    solved = sum(e.solved for e in episodes)
    seams = [s for e in episodes for s in e.seam_steps]
    inner = [s for e in episodes for s in e.inner_steps]
    predict = [p for e in episodes for p in e.predict_ms]
    return {
        "episodes": len(episodes),
        "solved": solved,
        "ci95": [round(v, 4) for v in wilson_interval(solved, len(episodes))],
        "ticks_mean": round(float(np.mean([e.ticks for e in episodes])), 2),
        "held_share": round(sum(e.held for e in episodes) / sum(e.ticks for e in episodes), 4),
        "seam_step": _spread(seams),
        "inner_step": _spread(inner),
        "predict_ms": _spread(predict) | {"mean": round(float(np.mean(predict)), 3)},
        "escalated_share": round(sum(e.escalated for e in episodes) / max(len(predict), 1), 4),
        "solved_by_task": {
            task: sum(e.solved for e in episodes if e.task == task)
            for task in dict.fromkeys(e.task for e in episodes)
        },
    }


def _spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {"p50": 0.0, "p99": 0.0}
    p50, p99 = np.percentile(values, (50, 99))
    return {"p50": round(float(p50), 4), "p99": round(float(p99), 4)}


def outcomes(episodes: list[Episode]) -> list[dict[str, Any]]:
    """Return what is kept of each episode in a result file."""
    kept = ("task", "episode", "solved", "ticks")
    return [{key: asdict(episode)[key] for key in kept} for episode in episodes]


def pinned(path: Path) -> str:
    """Return a directory as it may stand in a result: its last two parts."""
    return "/".join(path.parts[-2:])
