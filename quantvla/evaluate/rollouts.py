"""Rollouts for films: an episode is run as in the evaluation, then replayed from its actions in larger pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quantvla.evaluate.arms import Arm, ChunkPolicy, load_policy
from quantvla.evaluate.environment import Environment, MetaWorld, Simulator
from quantvla.evaluate.episode import Trajectory, environment_seed, run_episode


@dataclass(frozen=True)
class Rollout:
    """Pictures of one episode of one arm, every few steps: ``frames`` of (height, width, 3) uint8 RGB."""

    arm: str
    task: str
    episode: int
    success: bool
    steps: int
    frames: tuple[npt.NDArray[np.uint8], ...]


def record_rollouts(
    arms: Sequence[Arm],
    tasks: Sequence[str],
    *,
    seed: int = 0,
    episode: int = 0,
    every: int = 5,
    image_size: int = 240,
    simulator: Simulator | None = None,
    load: Callable[[Arm], ChunkPolicy] = load_policy,
) -> Iterator[Rollout]:
    """Yield a rollout of every task and arm, with the seed and noise of the same evaluated episode.

    ``frames`` holds the first camera's picture at the start, after every ``every`` steps, and at
    the end.
    """
    simulator = MetaWorld() if simulator is None else simulator
    with redirect_stdout(sys.stderr):  # lerobot prints while it loads
        policies = [load(arm) for arm in arms]
    for task in tasks:
        environment = simulator.open(task)
        stage = simulator.open(task, image_size=image_size)
        try:
            for arm, policy in zip(arms, policies, strict=True):
                trajectory = run_episode(
                    policy, arm.contract, environment, task, episode, seed=seed
                )
                yield Rollout(
                    arm=arm.name,
                    task=task,
                    episode=episode,
                    success=trajectory.success,
                    steps=len(trajectory.actions),
                    frames=_film(
                        stage,
                        trajectory,
                        environment_seed(seed, episode),
                        every,
                        simulator.cameras[0],
                    ),
                )
        finally:
            environment.close()
            stage.close()


def _film(
    stage: Environment, trajectory: Trajectory, seed: int, every: int, camera: str
) -> tuple[npt.NDArray[np.uint8], ...]:
    """Replay the actions; the simulator is deterministic, so the pictures show the evaluated episode."""
    frames: list[npt.NDArray[np.uint8]] = [stage.reset(seed)[camera]]
    last = len(trajectory.actions) - 1
    for index, action in enumerate(trajectory.actions):
        stage.step(action)
        if (index + 1) % every == 0 or index == last:
            frames.append(stage.observe()[camera])
    return tuple(frames)
