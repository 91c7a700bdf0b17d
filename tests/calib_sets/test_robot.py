"""A set of another robot is refused with the names that differ."""

from __future__ import annotations

import pytest

from quantvla.calib_sets import RobotSpec, check_robot
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.manifest import CameraSpec, VectorSpec

CAMERA = CameraSpec(key="observation.images.top", height=16, width=24)
WRIST = CameraSpec(key="observation.images.wrist", height=16, width=24)
STATE = VectorSpec(key="observation.state", dim=3, names=("x", "y", "z"))
ROBOT = RobotSpec(cameras=(CAMERA, WRIST), state=STATE)


def test_same_robot_other_resolution_and_more_cameras_are_fine() -> None:
    check_robot(ROBOT, [CameraSpec(key=CAMERA.key, height=480, width=640)], STATE)
    check_robot(ROBOT, [WRIST, CAMERA], VectorSpec(key="observation.state", dim=3))


def test_missing_camera_names_the_nearest() -> None:
    wanted = CameraSpec(key="observation.images.wrist2", height=16, width=24)
    with pytest.raises(
        QuantVLAError,
        match=r"^my set: .*needs camera 'observation.images.wrist2', got observation.images.top, "
        r"observation.images.wrist; did you mean 'observation.images.wrist'\?",
    ):
        check_robot(ROBOT, [wanted], STATE, where="my set")


def test_other_state_length() -> None:
    with pytest.raises(QuantVLAError, match=r"observation.state has 7 entries, got 3; record"):
        check_robot(ROBOT, [CAMERA], VectorSpec(key="observation.state", dim=7))


def test_other_state_names() -> None:
    other = VectorSpec(key="observation.state", dim=3, names=("a", "b", "c"))
    with pytest.raises(QuantVLAError, match=r"observation.state is a, b, c, got x, y, z"):
        check_robot(ROBOT, [CAMERA], other)


def test_other_state_key() -> None:
    with pytest.raises(QuantVLAError, match=r"reads the state from 'observation.joints'"):
        check_robot(ROBOT, [CAMERA], VectorSpec(key="observation.joints", dim=3))
