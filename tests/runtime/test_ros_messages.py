"""ROS messages as arrays, and a node's parameters against an engine."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from ros_stub import Image, JointState, Stamp
from tiny_engine import CAMERAS, make_manifest

from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.ros2.messages import capture_time, image_pixels, joint_positions
from quantvla.runtime.ros2.settings import Parameters, defaults, read_parameters, wire

PIXELS = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
TOPICS = dict.fromkeys(CAMERAS, "/image")
GOOD = Parameters(engine="e", command_joints=("lift", "turn"))


@pytest.mark.parametrize(
    ("encoding", "pixels"),
    [
        ("rgb8", PIXELS),
        ("bgr8", PIXELS[:, :, ::-1]),
        ("rgba8", np.dstack([PIXELS, np.full((2, 3), 255, np.uint8)])),
        ("bgra8", np.dstack([PIXELS[:, :, ::-1], np.full((2, 3), 255, np.uint8)])),
    ],
)
@pytest.mark.parametrize("padding", [0, 5])
def test_every_colour_encoding_is_rgb(encoding: str, pixels: np.ndarray, padding: int) -> None:
    rows = pixels.reshape(2, -1)
    data = np.pad(rows, ((0, 0), (0, padding)), constant_values=9)
    message = Image(height=2, width=3, encoding=encoding, step=data.shape[1], data=data.tobytes())
    np.testing.assert_array_equal(image_pixels(message, "cam"), PIXELS, strict=True)


@pytest.mark.parametrize("encoding", ["mono8", "16UC1", "bayer_rggb8", "yuv422_yuy2"])
def test_other_encodings_are_refused(encoding: str) -> None:
    message = Image(height=2, width=3, encoding=encoding, step=9, data=bytes(18))
    with pytest.raises(QuantVLAError, match=rf"'cam': expected one of rgb8.*got '{encoding}'"):
        image_pixels(message, "cam")


@pytest.mark.parametrize(("step", "size"), [(9, 17), (8, 16), (9, 27)])
def test_images_of_the_wrong_length_are_refused(step: int, size: int) -> None:
    message = Image(height=2, width=3, step=step, data=bytes(size))
    with pytest.raises(QuantVLAError, match=f"got {size} bytes"):
        image_pixels(message, "cam")


def test_joints_come_in_the_policys_order() -> None:
    message = JointState(name=["c", "a", "x", "b"], position=[3.0, 1.0, 9.0, 2.0])
    assert joint_positions(message, ["a", "b", "c"]).tolist() == [1, 2, 3]


def test_a_missing_joint_is_named() -> None:
    with pytest.raises(QuantVLAError, match="no position of b, got a; correct state_joints"):
        joint_positions(JointState(name=["a"], position=[1.0]), ["a", "b"])
    with pytest.raises(QuantVLAError, match="differ in number, got 2 and 1"):
        joint_positions(JointState(name=["a", "b"], position=[1.0]), ["a", "b"])


def test_capture_times() -> None:
    stamp = Stamp(sec=100, nanosec=500_000_000)
    assert capture_time(stamp, ros_now_s=101.0, now_s=7.0) == 6.5
    assert capture_time(stamp, ros_now_s=99.0, now_s=7.0) == 7.0  # another machine's clock is ahead
    assert capture_time(Stamp(), ros_now_s=101.0, now_s=7.0) == 7.0  # no stamp


def test_the_defaults_are_parameters_but_for_the_engine() -> None:
    assert [] not in defaults().values()
    with pytest.raises(QuantVLAError, match="parameter 'engine': is missing"):
        read_parameters(defaults())
    assert read_parameters({**defaults(), "engine": "e"}) == Parameters(engine="e")


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("rate_hz", 0.0, "rate_hz"),
        ("strategy", "fast", "Invalid enum value 'fast' - at `\\$.strategy`"),
        ("guard_mode", "off", "guard_mode"),
        ("execute", -1, "execute"),
        ("max_age_s", "long", "max_age_s"),
        ("speed", 1, "unknown field `speed`"),
    ],
)
def test_a_wrong_parameter_is_named(name: str, value: object, match: str) -> None:
    with pytest.raises(QuantVLAError, match=match):
        read_parameters({**defaults(), "engine": "e", name: value})


def test_names_come_from_the_engine_unless_given() -> None:
    wiring = wire(GOOD, TOPICS, make_manifest())
    assert wiring.state_joints == ("shoulder", "elbow", "wrist")
    assert wiring.command_joints == ("lift", "turn")
    assert wiring.state_scale.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"command_joints": ("",)}, "'command_joints': expected 2 different joint names"),
        ({"command_joints": ("lift", "lift")}, "got \\['lift', 'lift'\\]"),
        ({"state_joints": ("a", "b")}, "'state_joints': expected 3 different"),
        ({"state_scale": (1.0, 2.0)}, "'state_scale': expected 1 or 3 numbers"),
        ({"command_scale": (0.0,)}, "that are not 0, got \\[0.0\\]"),
        ({"command_scale": (float("nan"),)}, "command_scale"),
    ],
)
def test_what_does_not_fit_the_engine_is_refused(changes: dict[str, object], match: str) -> None:
    import msgspec

    with pytest.raises(QuantVLAError, match=match):
        wire(msgspec.structs.replace(GOOD, **changes), TOPICS, make_manifest())


def test_a_camera_without_a_topic_is_named() -> None:
    topics = {**TOPICS, CAMERAS[1]: ""}
    with pytest.raises(QuantVLAError, match=r"'topics.images.wrist': is missing, the engine reads"):
        wire(GOOD, topics, make_manifest())
    assert dataclasses.is_dataclass(wire(GOOD, TOPICS, make_manifest()))
