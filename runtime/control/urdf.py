"""Joint limits of a robot description (URDF)."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

from quantvla.runtime.control.limits import JointLimits, Limits, joint_names
from quantvla.runtime.errors import explain, nearest
from quantvla.runtime.manifest import ActionSpec

_MOVING = ("revolute", "prismatic", "continuous")


def read_urdf(path: Path, action: ActionSpec, *, degrees: bool = False) -> Limits:
    """Return position and velocity limits of the joints that the action names.

    A URDF is in radians and metres: ``degrees`` converts revolute and continuous joints for
    policies that act in degrees. Names of the action's entries may end in ``.pos``, as lerobot's
    do. Raises `QuantVLAError` if the action has no names, or the file has not a joint or its limits.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise explain(
            path, "not a URDF file", got=error, remedy="give a URDF or a limits file"
        ) from error
    found = {j.get("name", ""): j for j in root.iter("joint") if j.get("type") in _MOVING}
    if not action.names:
        raise explain(
            path,
            "cannot be matched, since the engine does not know the names of its actions",
            remedy=f"write a limits file for the joints {', '.join(joint_names(action))}",
        )
    joints = []
    for name in action.names:
        joint = found.get(name, found.get(name.removesuffix(".pos")))
        if joint is None:
            raise explain(path, f"no moving joint {name!r}", remedy=nearest(name, found))
        joints.append(_limits(path, name, joint, degrees=degrees))
    return Limits(tuple(joints), str(path))


def _limits(path: Path, name: str, joint: ElementTree.Element, *, degrees: bool) -> JointLimits:
    limit = joint.find("limit")
    kind = joint.get("type")
    scale = 180 / math.pi if degrees and kind != "prismatic" else 1.0

    def number(field: str) -> float | None:
        text = None if limit is None else limit.get(field)
        try:
            return None if text is None else float(text) * scale
        except ValueError as error:
            raise explain(
                f"{path}: joint {name!r}", f"{field} is not a number", got=text, remedy="correct it"
            ) from error

    lower, upper = (None, None) if kind == "continuous" else (number("lower"), number("upper"))
    if kind != "continuous" and (lower is None or upper is None):
        raise explain(
            f"{path}: joint {name!r}",
            "has no position limits",
            remedy="add them or give a limits file",
        )
    velocity = number("velocity")
    return JointLimits(name=name, lower=lower, upper=upper, velocity=velocity or None)
