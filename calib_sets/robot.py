"""Is this calibration set of the robot that the policy drives?"""

from __future__ import annotations

from collections.abc import Sequence

from quantvla.calib_sets.card import RobotSpec
from quantvla.runtime.errors import explain, nearest
from quantvla.runtime.manifest import CameraSpec, VectorSpec


def check_robot(
    robot: RobotSpec,
    cameras: Sequence[CameraSpec],
    state: VectorSpec,
    *,
    where: object = "calibration set",
) -> None:
    """Raise `QuantVLAError` if a set recorded on ``robot`` cannot calibrate a policy with these inputs.

    Every camera of the policy must be in the set under the same key; the set may hold more. The
    state must have the same key, the same length and, where both sides know them, the same names.
    Image sizes are not compared: the preprocessing resizes what it gets.
    """
    keys = [camera.key for camera in robot.cameras]
    for camera in cameras:
        if camera.key not in keys:
            raise explain(
                where,
                f"is of another robot: the policy needs camera {camera.key!r}",
                got=", ".join(keys),
                remedy=f"{nearest(camera.key, keys)} record with the policy's camera keys",
            )
    if robot.state.key != state.key:
        raise explain(
            where,
            f"is of another robot: the policy reads the state from {state.key!r}",
            got=robot.state.key,
            remedy="record with the policy's keys",
        )
    if robot.state.dim != state.dim:
        raise explain(
            where,
            f"is of another robot: the policy's {state.key} has {state.dim} entries",
            got=robot.state.dim,
            remedy="record a set on the policy's robot",
        )
    if robot.state.names and state.names and robot.state.names != state.names:
        raise explain(
            where,
            f"is of another robot: the policy's {state.key} is {', '.join(state.names)}",
            got=", ".join(robot.state.names),
            remedy="record a set on the policy's robot",
        )
