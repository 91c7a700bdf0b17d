"""How far and how fast an action may go: from a limits file, a URDF, or the engine's statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.errors import explain, nearest
from quantvla.runtime.manifest import ActionSpec, Manifest
from quantvla.runtime.processing_steps import FeatureStatistics, command_statistics

Vector = NDArray[np.float64]
Positive = Annotated[float, msgspec.Meta(gt=0)]
MARGIN = 0.1
"""Share of the range of the training actions by which the limits from statistics are wider than it."""


class JointLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds of one entry of the action; what is left out is not bounded.

    ``lower``, ``upper``: of the command itself. ``velocity`` per second, ``acceleration`` per
    second squared, ``jerk`` per second cubed, ``seam``: the largest step from one chunk to the
    next. ``relative``: the command is a displacement per tick (or a velocity), so that zero means
    to hold; otherwise it is a target, and holding repeats it. ``state``: entry of the state vector
    that measures this joint, the reference for the first command.
    """

    name: str
    lower: float | None = None
    upper: float | None = None
    velocity: Positive | None = None
    acceleration: Positive | None = None
    jerk: Positive | None = None
    seam: Positive | None = None
    relative: bool = False
    state: Annotated[int, msgspec.Meta(ge=0)] | None = None


class LimitsFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of a limits file (JSON): one entry per entry of the action, in any order."""

    joints: tuple[JointLimits, ...]


@dataclass(frozen=True)
class Limits:
    """Bounds of every entry of an action, in its order, with where they come from."""

    joints: tuple[JointLimits, ...]
    source: str

    def __post_init__(self) -> None:
        """Raise `QuantVLAError` for bounds that admit nothing."""
        for joint in self.joints:
            numbers = [v for v in (joint.lower, joint.upper) if v is not None]
            if not np.isfinite(numbers).all() or (len(numbers) == 2 and numbers[0] >= numbers[1]):
                raise explain(
                    f"{self.source}: joint {joint.name!r}",
                    "expected finite lower < upper",
                    got=f"{joint.lower} and {joint.upper}",
                    remedy="correct the limits",
                )
            if joint.relative and any((v > 0) == (v is joint.lower) for v in numbers if v):
                raise explain(
                    f"{self.source}: joint {joint.name!r}",
                    "a relative command must be allowed to be 0, or the robot cannot hold",
                    got=f"{joint.lower} to {joint.upper}",
                    remedy="correct the limits",
                )

    @property
    def dim(self) -> int:
        """Length of an action."""
        return len(self.joints)

    @property
    def relative(self) -> NDArray[np.bool_]:
        """Which entries are displacements: (dim,)."""
        return np.array([joint.relative for joint in self.joints], dtype=np.bool_)

    def bound(self, field: str, unbounded: float) -> Vector:
        """Return one field of all joints, (dim,); ``unbounded`` where it is not given."""
        values = [getattr(joint, field) for joint in self.joints]
        return np.array([unbounded if value is None else value for value in values], np.float64)


def joint_names(action: ActionSpec) -> tuple[str, ...]:
    """Return the names of an action's entries; their positions where the engine does not know any."""
    return action.names or tuple(str(index) for index in range(action.dim))


def limits_from_manifest(manifest: Manifest, relative: Sequence[bool] = ()) -> Limits:
    """Return bounds on the commands alone: the range of the training actions, widened by `MARGIN`.

    Statistics say nothing of speeds: velocity, acceleration, jerk and seam stay unbounded.
    ``relative`` says which entries are displacements (default: none).
    """
    names = joint_names(manifest.action)
    statistics = command_statistics(manifest.postprocess, manifest.statistics)
    ends = _range(statistics)
    flags = tuple(relative) or (False,) * len(names)
    # Displacements and efforts share names with what the state measures, but not its units.
    states = (None,) * len(names) if any(flags) else _measured(manifest, names)
    if ends is None or len(flags) != len(names):
        raise explain(
            "motion guard",
            "the engine's action statistics give no range"
            if ends is None
            else f"expected {len(names)} flags of relative actions, got {len(flags)}",
            remedy="give a limits file",
        )
    low, high = ends
    slack = MARGIN * np.maximum(high - low, 1e-6)
    joints = tuple(
        JointLimits(
            name=name,
            lower=float(min(low[i] - slack[i], 0.0) if flags[i] else low[i] - slack[i]),
            upper=float(max(high[i] + slack[i], 0.0) if flags[i] else high[i] + slack[i]),
            relative=bool(flags[i]),
            state=states[i],
        )
        for i, name in enumerate(names)
    )
    return Limits(joints, "action statistics of the engine")


def _range(statistics: FeatureStatistics | None) -> tuple[Vector, Vector] | None:
    """Return the ends of the training actions: recorded, from quantiles, or five deviations from the mean."""
    if statistics is None:
        return None
    for low, high in ((statistics.min, statistics.max), (statistics.q01, statistics.q99)):
        if low is not None and high is not None:
            return np.array(low, np.float64), np.array(high, np.float64)
    if statistics.mean is None or statistics.std is None:
        return None
    mean, spread = np.array(statistics.mean, np.float64), 5 * np.array(statistics.std, np.float64)
    return mean - spread, mean + spread


def _measured(manifest: Manifest, names: tuple[str, ...]) -> tuple[int | None, ...]:
    """Return for each action entry the state entry of the same name."""
    known = {name: index for index, name in enumerate(manifest.state.names)}
    return tuple(known.get(name) for name in names)


def read_limits(path: Path, action: ActionSpec) -> Limits:
    """Return the limits of a JSON file for an engine's action; names must be exactly the action's."""
    if not path.is_file():
        raise explain(path, "no such file", remedy="give a limits file (docs/runtime.md)")
    try:
        found = msgspec.json.decode(path.read_bytes(), type=LimitsFile)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise explain(path, f"not a limits file ({error})", remedy="correct that key") from error
    return Limits(order_joints(path, found.joints, joint_names(action)), str(path))


def order_joints(
    where: object, joints: Sequence[JointLimits], names: Sequence[str]
) -> tuple[JointLimits, ...]:
    """Return ``joints`` in the order of ``names``; a name too many, twice or missing is refused."""
    by_name = {joint.name: joint for joint in joints}
    for joint in joints:
        if joint.name not in names or by_name[joint.name] is not joint:
            wrong = "the policy has no such joint" if joint.name not in names else "named twice"
            raise explain(where, wrong, got=repr(joint.name), remedy=nearest(joint.name, names))
    missing = [name for name in names if name not in by_name]
    if missing:
        raise explain(
            where, f"no limits for {', '.join(missing)}", remedy="add an entry for every joint"
        )
    return tuple(by_name[name] for name in names)


def limits_schema() -> bytes:
    """Return the JSON Schema of a limits file."""
    return (
        msgspec.json.format(msgspec.json.encode(msgspec.json.schema(LimitsFile)), indent=1) + b"\n"
    )
