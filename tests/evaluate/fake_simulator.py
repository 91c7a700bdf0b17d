"""A simulator and policies that need nothing installed, importable by worker processes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantvla.evaluate.arms import Arm, Contract
from quantvla.evaluate.perturbation import UNCHANGED, Perturbation

CAMERA = "observation.images.front"
CONTRACT = Contract(
    cameras=(CAMERA,),
    state_key="observation.state",
    state_dim=2,
    task_key="task",
    action_dim=2,
    horizon=4,
    execute=2,
    noise_shape=(1, 4, 3),
)


@dataclass(frozen=True)
class FakeStep:
    reward: float
    success: bool


@dataclass
class FakeEnvironment:
    """A point that must come within 0.3 of a goal drawn from the seed, in at most 12 steps."""

    task: str
    image_size: int = 8
    cameras: tuple[str, ...] = (CAMERA,)
    state_dim: int = 2
    position: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    goal: npt.NDArray[np.float64] = field(default_factory=lambda: np.ones(2))
    steps: int = 0
    renders: int = 0

    @property
    def done(self) -> bool:
        return self.steps >= 12 or self._near

    @property
    def _near(self) -> bool:
        return bool(np.linalg.norm(self.goal - self.position) < 0.3)

    def reset(self, seed: int) -> Mapping[str, Any]:
        generator = np.random.default_rng([seed, len(self.task)])
        self.goal = generator.uniform(1, 2, 2)
        self.position, self.steps = np.zeros(2), 0
        return self.observe()

    def observe(self) -> Mapping[str, Any]:
        self.renders += 1
        image = np.full((self.image_size, self.image_size, 3), 40 + 10 * self.steps, np.uint8)
        offset = (self.goal - self.position).astype(np.float32)
        state = np.zeros(self.state_dim, np.float32)
        state[:2] = offset
        cameras = dict.fromkeys(self.cameras, image)
        return {**cameras, "observation.state": state, "task": self.task, "unused": 0}

    def step(self, action: npt.NDArray[np.float32]) -> FakeStep:
        assert not self.done
        self.position = self.position + action[:2]
        self.steps += 1
        return FakeStep(reward=-1.0, success=self._near)

    def close(self) -> None:
        self.steps = 0


@dataclass(frozen=True)
class FakeSimulator:
    name: str = "fake"
    tasks: tuple[str, ...] = ("go", "come", "fetch")
    cameras: tuple[str, ...] = (CAMERA,)
    state_key: str = "observation.state"
    state_dim: int = 2
    action_dim: int = 2
    perturbation: Perturbation = UNCHANGED

    def check_installed(self) -> None:
        """Always installed."""

    def open(self, task: str, *, image_size: int | None = None) -> FakeEnvironment:
        return FakeEnvironment(task, image_size or 8, self.cameras, self.state_dim)


@dataclass
class NoisyPolicy:
    """Goes to the goal in steps of a quarter, off course by ``scale`` times the flow noise."""

    scale: float
    log: Path | None = None

    def predict_action_chunk(
        self,
        observation: Mapping[str, Any],
        *,
        noise: npt.NDArray[np.float32] | None = None,
        seed: int | None = None,
    ) -> npt.NDArray[np.float32]:
        assert set(observation) == set(CONTRACT.observation_keys)
        assert noise is not None and noise.shape == CONTRACT.noise_shape
        if self.log is not None:
            with self.log.open("a") as stream:
                stream.write(f"{observation['task']} {noise.ravel()[:3].tolist()}\n")
        step = observation["observation.state"][:2] / 4
        return (step + self.scale * noise[0, :, :2]).astype(np.float32)


class BrokenPolicy(NoisyPolicy):
    """Makes chunks that are not finite."""

    def predict_action_chunk(self, observation: Mapping[str, Any], **given: Any) -> Any:
        return np.full((4, 2), np.nan, np.float32)


class RaisingPolicy(NoisyPolicy):
    """Raises on the task ``fetch``."""

    def predict_action_chunk(self, observation: Mapping[str, Any], **given: Any) -> Any:
        if observation["task"] == "fetch":
            raise ZeroDivisionError("no engine")
        return super().predict_action_chunk(observation, **given)


class DyingPolicy(NoisyPolicy):
    """Ends its process on the task ``fetch``, as the kernel's memory killer would."""

    def predict_action_chunk(self, observation: Mapping[str, Any], **given: Any) -> Any:
        if observation["task"] == "fetch":
            os._exit(7)
        return super().predict_action_chunk(observation, **given)


def load(arm: Arm) -> NoisyPolicy:
    """Load by name: ``good``, ``bad`` and so on; the path is a log of the noises seen, if given."""
    kinds = {"broken": BrokenPolicy, "raising": RaisingPolicy, "dying": DyingPolicy}
    scale = {"good": 0.02, "bad": 0.45}.get(arm.name, 0.02)
    log = Path(arm.path) if arm.path and not Path(arm.path).is_dir() else None
    return kinds.get(arm.name, NoisyPolicy)(scale, log)


def arm(name: str, path: str = "", contract: Contract = CONTRACT) -> Arm:
    """Return an arm that `load` knows how to load."""
    return Arm(name=name, path=path, kind="engine", sha256=f"hash of {name}", contract=contract)
