"""Changes of the reference tasks that make them harder, the same for every arm.

What an episode is changed by follows from its environment seed alone: not from the arm, the
process, or what ran before. A sweep over the strength finds the hardest bed that the float policy
still masters; damage that easy tasks hide shows there.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.errors import explain, nearest

MOVED_CAMERA = "corner2"


class Perturbation(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """How strongly the tasks are changed; 0 leaves a thing as it is.

    camera: metres that the fixed camera is moved, in a direction drawn for each episode.
    light: the lamps are (1 + light) times as bright or as dim, drawn for each episode.
    goals: by which share the range that goals and objects are drawn from is wider, about its middle.
    actions: standard deviation of a disturbance added to every executed action (actions are in [-1, 1]).
    """

    camera: float = 0.0
    light: float = 0.0
    goals: float = 0.0
    actions: float = 0.0

    def as_dict(self) -> dict[str, float]:
        """Return the changes that are not zero, by name."""
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value}


UNCHANGED = Perturbation()


@dataclass(frozen=True)
class _Bound:
    unit: str
    highest: float


_BOUNDS = {
    "camera": _Bound("metres", 0.5),
    "light": _Bound("share", 4.0),
    "goals": _Bound("share", 1.0),
    "actions": _Bound("standard deviation", 2.0),
}


def parse_perturbation(arguments: Sequence[str]) -> Perturbation:
    """Return the perturbation of ``NAME=VALUE`` arguments; unknown names and values out of range are refused."""
    values: dict[str, float] = {}
    for argument in arguments:
        name, _, text = argument.partition("=")
        if name not in _BOUNDS:
            raise explain("--perturb", "unknown perturbation", got=repr(name), remedy=nearest(name, _BOUNDS))  # fmt: skip
        if name in values:
            raise explain("--perturb", "given twice", got=repr(name), remedy="give one value")
        values[name] = _value(name, text)
    return Perturbation(**values)


def _value(name: str, text: str) -> float:
    bound = _BOUNDS[name]
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= bound.highest:
        raise explain(
            f"--perturb {name}",
            f"expected a number from 0 to {bound.highest:g} ({bound.unit})",
            got=repr(text),
            remedy=f"write for example --perturb {name}={bound.highest / 10:g}",
        )
    return value


class Perturber:
    """Applies a perturbation to one Meta-World environment."""

    def __init__(self, environment: Any, task: str, perturbation: Perturbation) -> None:
        """Remember what the environment is like unchanged, and widen the range of goals."""
        self._model = environment.model
        self._task = zlib.crc32(task.encode())
        self._perturbation = perturbation
        self._camera = self._model.camera(MOVED_CAMERA).id
        self._camera_position = self._model.cam_pos[self._camera].copy()
        self._lamps = [
            (lamp, lamp.copy())
            for lamp in (
                self._model.light_diffuse, self._model.light_ambient,
                self._model.vis.headlight.diffuse, self._model.vis.headlight.ambient,
            )
        ]  # fmt: skip
        self._actions = np.random.default_rng(0)
        if perturbation.goals:
            widen(environment._random_reset_space, perturbation.goals)

    def start(self, seed: int) -> None:
        """Change what the episode of ``seed`` is changed by; to be called before the environment is reset."""
        rng = np.random.default_rng([seed, self._task, 1])
        direction, brighter = rng.standard_normal(3), rng.random() < 0.5
        moved = self._perturbation.camera * direction / np.linalg.norm(direction)
        self._model.cam_pos[self._camera] = self._camera_position + moved
        factor = 1 + self._perturbation.light
        for lamp, original in self._lamps:
            lamp[:] = original * (factor if brighter else 1 / factor)
        self._actions = np.random.default_rng([seed, self._task, 2])

    def disturb(self, action: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        """Return the action that reaches the robot; one draw per step, whatever the action is."""
        if not self._perturbation.actions:
            return action
        return action + self._perturbation.actions * self._actions.standard_normal(action.shape)


def widen(space: Any, share: float) -> None:
    """Widen a box (``low``, ``high``) about its middle by ``share``, in place."""
    extra = (space.high - space.low) * share / 2
    space.low, space.high = space.low - extra, space.high + extra
