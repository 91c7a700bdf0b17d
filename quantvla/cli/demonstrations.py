"""Frames of Meta-World's scripted experts, for ``quantvla calib record``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from quantvla.calib_sets import Observation, SetSource
from quantvla.evaluate.metaworld import TASKS, MetaWorldEnv
from quantvla.runtime.errors import QuantVLAError, explain, nearest

FIRST_SEED = 200_000
"""Above the seeds of evaluation (0 to 999) and of the reference policy's demonstrations."""
SEEDS_APART = 10_000
TRIES_PER_EPISODE = 5


@dataclass(frozen=True)
class Demonstration:
    """One frame of an expert's episode."""

    observation: Observation
    episode: int
    frame: int


@dataclass(frozen=True)
class DemonstrationPlan:
    """What to record: tasks, episodes of each, every ``stride``-th step, noise on actions, seed."""

    tasks: tuple[str, ...]
    episodes: int
    stride: int
    noise: float
    seed: int

    @classmethod
    def parse(
        cls, tasks: str, *, episodes: int, stride: int, noise: float, seed: int
    ) -> DemonstrationPlan:
        """Return the plan for comma-separated task names or ``all``; an unknown name is refused."""
        known = [task.name for task in TASKS]
        names = known if tasks == "all" else [name.strip() for name in tasks.split(",")]
        for name in names:
            if name not in known:
                raise explain(
                    "--tasks",
                    "unknown Meta-World task",
                    got=repr(name),
                    remedy=nearest(name, known),
                )
        return cls(tuple(names), episodes, stride, noise, seed)


def describe_simulator(env: str, plan: DemonstrationPlan) -> SetSource:
    """Return the source for the card: simulator and everything that reproduces the recording."""
    return SetSource(
        kind=env,
        name=f"scripted experts, {plan.episodes} episodes per task, every {plan.stride} steps, "
        f"noise {plan.noise}, seed {plan.seed}",
    )


def demonstrations(plan: DemonstrationPlan) -> Iterator[Demonstration]:
    """Yield the frames of every solved episode. Raises `QuantVLAError` if the simulator is missing."""
    for number, task in enumerate(plan.tasks):
        try:
            env = MetaWorldEnv(task)
        except ImportError as error:
            raise QuantVLAError(str(error)) from error
        with env:
            first = number * plan.episodes
            yield from _task_episodes(env, plan, first)


def _task_episodes(
    env: MetaWorldEnv, plan: DemonstrationPlan, first: int
) -> Iterator[Demonstration]:
    solved = 0
    start = FIRST_SEED + SEEDS_APART * plan.seed
    for seed in range(start, start + TRIES_PER_EPISODE * plan.episodes):
        observations = _solve(env, seed, plan)
        if observations is None:
            continue
        for frame, observation in observations:
            yield Demonstration(observation, first + solved, frame)
        solved += 1
        if solved == plan.episodes:
            return
    raise explain(
        env.task.name,
        f"the expert must solve {plan.episodes} of {TRIES_PER_EPISODE * plan.episodes} episodes",
        got=solved,
        remedy="lower --noise",
    )


def _solve(
    env: MetaWorldEnv, seed: int, plan: DemonstrationPlan
) -> list[tuple[int, Observation]] | None:
    """Return (step, observation) of the episode ``seed``, None when the expert does not solve it."""
    from metaworld.policies import ENV_POLICY_MAP

    expert = ENV_POLICY_MAP[env.task.name]()
    noise = np.random.default_rng(seed)
    env.reset(seed, render=False)
    kept: list[tuple[int, Observation]] = []
    success = False
    step = 0
    while not env.done:
        if step % plan.stride == 0:
            kept.append((step, env.observe()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the expert says that it may be clipped
            action = np.clip(expert.get_action(env.raw_observation), -1.0, 1.0).astype(np.float32)
        action[:3] += noise.normal(scale=plan.noise, size=3)
        success = env.step(action).success
        step += 1
    return kept if success else None
