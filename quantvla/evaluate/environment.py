"""What the closed loop needs of a simulator, the Meta-World one, and whether a policy fits it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from quantvla.evaluate import metaworld
from quantvla.evaluate.arms import Arm
from quantvla.evaluate.perturbation import UNCHANGED, Perturbation
from quantvla.runtime.errors import explain, nearest

ALL_TASKS = "all"


class StepResult(Protocol):
    """What one action did."""

    @property
    def reward(self) -> float:
        """The task's reward for this step."""
        ...

    @property
    def success(self) -> bool:
        """Whether the task is solved."""
        ...


class Environment(Protocol):
    """One task that can be reset to a seed. ``observe`` renders; ``step`` does not."""

    @property
    def done(self) -> bool:
        """Whether the episode is over: solved, or out of time."""
        ...

    def reset(self, seed: int) -> Mapping[str, Any]:
        """Start the episode that ``seed`` defines and return its first observation."""
        ...

    def observe(self) -> Mapping[str, Any]:
        """Return the present observation: cameras (H, W, 3) uint8 RGB, the state vector, the task sentence."""
        ...

    def step(self, action: npt.NDArray[np.float32]) -> StepResult:
        """Apply one action (dim,)."""
        ...

    def close(self) -> None:
        """Free what rendering holds."""
        ...


class Simulator(Protocol):
    """A set of tasks with one observation and action space. A value that can be pickled to worker processes."""

    @property
    def name(self) -> str:
        """Name for journals and reports."""
        ...

    @property
    def tasks(self) -> tuple[str, ...]:
        """All task names, in the order of reports."""
        ...

    @property
    def cameras(self) -> tuple[str, ...]:
        """Observation keys of the cameras; the first one is filmed."""
        ...

    @property
    def state_key(self) -> str:
        """Observation key of the state vector."""
        ...

    @property
    def state_dim(self) -> int:
        """Length of the state vector."""
        ...

    @property
    def action_dim(self) -> int:
        """Length of an action."""
        ...

    @property
    def perturbation(self) -> Perturbation:
        """How its tasks are changed."""
        ...

    def check_installed(self) -> None:
        """Raise `QuantVLAError` with the remedy when the simulator cannot be imported."""
        ...

    def open(self, task: str, *, image_size: int | None = None) -> Environment:
        """Return the environment of ``task``; ``image_size`` overrides the pictures' size (for films)."""
        ...


@dataclass(frozen=True)
class MetaWorld:
    """The Meta-World tasks of `quantvla.evaluate.metaworld`, as they are or changed."""

    perturbation: Perturbation = UNCHANGED

    @property
    def name(self) -> str:
        """Name for journals and reports."""
        return "metaworld"

    @property
    def tasks(self) -> tuple[str, ...]:
        """All task names."""
        return tuple(task.name for task in metaworld.TASKS)

    @property
    def cameras(self) -> tuple[str, ...]:
        """Observation keys of both cameras."""
        return tuple(metaworld.CAMERA_KEY_PREFIX + camera for camera in metaworld.CAMERAS)

    @property
    def state_key(self) -> str:
        """Observation key of the state vector."""
        return metaworld.STATE_KEY

    @property
    def state_dim(self) -> int:
        """Length of the state vector."""
        return metaworld.STATE_DIM

    @property
    def action_dim(self) -> int:
        """Length of an action."""
        return metaworld.ACTION_DIM

    def check_installed(self) -> None:
        """Raise `QuantVLAError` when Meta-World or MuJoCo is missing."""
        for module in ("mujoco", "metaworld"):
            if importlib.util.find_spec(module) is None:
                raise explain(
                    module,
                    "the simulator is not installed",
                    remedy="run `pip install quantvla[sim]`",
                )

    def open(self, task: str, *, image_size: int | None = None) -> Environment:
        """Return the environment of ``task``."""
        if image_size is None:
            return metaworld.MetaWorldEnv(task, perturbation=self.perturbation)
        return metaworld.MetaWorldEnv(task, image_size=image_size, perturbation=self.perturbation)


def select_tasks(simulator: Simulator, names: Sequence[str]) -> tuple[str, ...]:
    """Return the named tasks in the simulator's order; ``all`` is every one. Unknown names are refused."""
    known = simulator.tasks
    for name in names:
        if name != ALL_TASKS and name not in known:
            raise explain(
                "tasks",
                f"unknown {simulator.name} task",
                got=repr(name),
                remedy=nearest(name, known),
            )
    if ALL_TASKS in names:
        return known
    chosen = tuple(task for task in known if task in names)
    if not chosen:
        raise explain("tasks", "no task named", remedy=f"name some or {ALL_TASKS!r}")
    return chosen


def check_fit(arm: Arm, simulator: Simulator) -> None:
    """Raise `QuantVLAError` unless the simulator has what the policy reads and takes what it makes."""
    contract = arm.contract
    subject = f"{arm.name} ({arm.path})"
    remedy = f"evaluate a policy that was trained for {simulator.name}"
    missing = [key for key in contract.cameras if key not in simulator.cameras]
    if missing:
        raise explain(
            subject,
            f"reads cameras that {simulator.name} does not have (it has {', '.join(simulator.cameras)})",
            got=", ".join(missing),
            remedy=remedy,
        )
    state = (contract.state_key, contract.state_dim)
    if state != (simulator.state_key, simulator.state_dim):
        raise explain(
            subject,
            f"expected state {simulator.state_key} of length {simulator.state_dim}",
            got=f"{contract.state_key} of length {contract.state_dim}",
            remedy=remedy,
        )
    if contract.action_dim != simulator.action_dim:
        raise explain(
            subject,
            f"expected actions of length {simulator.action_dim}",
            got=contract.action_dim,
            remedy=remedy,
        )
