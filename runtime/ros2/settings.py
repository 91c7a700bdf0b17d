"""What a node's parameters say, checked against the engine before anything moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.control.guard import Mode
from quantvla.runtime.control.spec import StrategyKind
from quantvla.runtime.errors import explain
from quantvla.runtime.manifest import Manifest

IMAGE_PREFIX = "observation.images."
_NONE = ("",)
"""A list that is not given: ROS cannot tell the type of an empty one."""

Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=0)]


class Parameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The node's parameters but for the cameras' topics, which the engine's cameras name.

    ``state_joints``: names in JointState in the order of the policy's state; ``command_joints``:
    names in the trajectory in the order of its action; left out, the engine's own names. Scales
    are policy units per ROS unit (57.29578 for a policy in degrees), one for all or one per joint.
    ``threads``, ``execute`` 0: one per core, as the policy was trained.
    """

    engine: str = ""
    threads: Count = 0
    rate_hz: Positive = 20.0
    task: str = ""
    autostart: bool = False
    strategy: StrategyKind = "rtc"
    execute: Count = 0
    guard_mode: Mode = "clamp"
    limits_file: str = ""
    max_age_s: Positive = 0.5
    state_joints: tuple[str, ...] = _NONE
    command_joints: tuple[str, ...] = _NONE
    state_scale: tuple[float, ...] = (1.0,)
    command_scale: tuple[float, ...] = (1.0,)
    joint_states_topic: str = msgspec.field(default="joint_states", name="topics.joint_states")
    instruction_topic: str = msgspec.field(default="instruction", name="topics.instruction")
    trajectory_topic: str = msgspec.field(default="joint_trajectory", name="topics.trajectory")


@dataclass(frozen=True)
class Wiring:
    """Parameters that were checked against an engine: who is who, in which units.

    ``image_topics``: camera key -> topic; scales: (joints,), policy units per ROS unit.
    """

    image_topics: Mapping[str, str]
    state_joints: tuple[str, ...]
    command_joints: tuple[str, ...]
    state_scale: NDArray[np.float64]
    command_scale: NDArray[np.float64]


def defaults() -> dict[str, object]:
    """Return names and defaults of `Parameters`, lists as ROS takes them."""
    return {
        field.encode_name: list(field.default)
        if isinstance(field.default, tuple)
        else field.default
        for field in msgspec.structs.fields(Parameters)
    }


def image_parameter(camera: str) -> str:
    """Return the parameter that names the topic of a camera: ``topics.images.front``."""
    return f"topics.images.{camera.removeprefix(IMAGE_PREFIX)}"


def read_parameters(values: Mapping[str, object]) -> Parameters:
    """Return the parameters in ``values``; raises `QuantVLAError` that names the wrong one."""
    try:
        parameters = msgspec.convert(dict(values), Parameters)
    except msgspec.ValidationError as error:
        raise explain("parameters", f"not as expected ({error})", remedy="correct them") from error
    if not parameters.engine:
        raise explain("parameter 'engine'", "is missing", remedy="give the engine's directory")
    return parameters


def wire(parameters: Parameters, image_topics: Mapping[str, str], manifest: Manifest) -> Wiring:
    """Return how the robot's names and units fit the engine's; raises `QuantVLAError` if they do not."""
    for camera in manifest.cameras:
        if not image_topics.get(camera.key):
            raise explain(
                f"parameter {image_parameter(camera.key)!r}",
                f"is missing, the engine reads {camera.key!r}",
                remedy="name the topic of that camera",
            )
    state, action = manifest.state, manifest.action
    state_joints = _joints("state_joints", parameters.state_joints, state.names, state.dim)
    command_joints = _joints("command_joints", parameters.command_joints, action.names, action.dim)
    return Wiring(
        image_topics=dict(image_topics),
        state_joints=state_joints,
        command_joints=command_joints,
        state_scale=_scale("state_scale", parameters.state_scale, len(state_joints)),
        command_scale=_scale("command_scale", parameters.command_scale, len(command_joints)),
    )


def _joints(
    name: str, given: tuple[str, ...], known: tuple[str, ...], count: int
) -> tuple[str, ...]:
    joints = known if given == _NONE else given
    if len(joints) != count or len(set(joints)) != count or "" in joints:
        raise explain(
            f"parameter {name!r}",
            f"expected {count} different joint names in the policy's order",
            got=list(joints),
            remedy="name the joints as the robot's JointState does",
        )
    return joints


def _scale(name: str, given: tuple[float, ...], count: int) -> NDArray[np.float64]:
    scale = np.array(given, dtype=np.float64)
    if scale.size not in (1, count) or not np.isfinite(scale).all() or (scale == 0).any():
        raise explain(
            f"parameter {name!r}",
            f"expected 1 or {count} numbers that are not 0",
            got=list(given),
            remedy="give policy units per ROS unit",
        )
    return np.broadcast_to(scale, (count,)).copy()
