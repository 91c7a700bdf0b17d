"""ROS messages -> arrays, and a command -> what a trajectory message holds. By their fields, without rclpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.errors import explain

# Encoding -> (channels, which of them are red, green and blue).
_ENCODINGS = {
    "rgb8": (3, (0, 1, 2)),
    "bgr8": (3, (2, 1, 0)),
    "rgba8": (4, (0, 1, 2)),
    "bgra8": (4, (2, 1, 0)),
}


class Time(Protocol):
    """builtin_interfaces/Time."""

    sec: int
    nanosec: int


class ImageMessage(Protocol):
    """The fields of sensor_msgs/Image that are read."""

    height: int
    width: int
    encoding: str
    step: int
    data: Any


class JointStateMessage(Protocol):
    """The fields of sensor_msgs/JointState that are read."""

    name: Sequence[str]
    position: Sequence[float]


def image_pixels(message: ImageMessage, key: str) -> NDArray[np.uint8]:
    """Return the (height, width, 3) uint8 RGB pixels of an image message, copied.

    Raises `QuantVLAError` for an encoding that is no 8-bit colour, and for data of another length.
    """
    if message.encoding not in _ENCODINGS:
        raise explain(
            f"observation {key!r}",
            f"expected one of {', '.join(_ENCODINGS)}",
            got=repr(message.encoding),
            remedy="convert the topic (image_proc, or the camera driver's own setting)",
        )
    channels, order = _ENCODINGS[message.encoding]
    height, width, step = message.height, message.width, message.step
    data = np.frombuffer(message.data, dtype=np.uint8)
    if data.size != height * step or step < width * channels:
        raise explain(
            f"observation {key!r}",
            f"expected {height} rows of {step} bytes for {width} pixels of {channels} bytes",
            got=f"{data.size} bytes",
            remedy="check the camera driver",
        )
    rows = data.reshape(height, step)[:, : width * channels]
    return np.ascontiguousarray(rows.reshape(height, width, channels)[:, :, order])


def joint_positions(message: JointStateMessage, joints: Sequence[str]) -> NDArray[np.float64]:
    """Return the positions of ``joints`` in their order, ROS units: (joints,) float64.

    Raises `QuantVLAError` if one is not in the message.
    """
    if len(message.name) != len(message.position):
        raise explain(
            "joint state",
            "names and positions differ in number",
            got=f"{len(message.name)} and {len(message.position)}",
            remedy="check the joint state broadcaster",
        )
    found = dict(zip(message.name, message.position, strict=True))
    missing = [joint for joint in joints if joint not in found]
    if missing:
        raise explain(
            "joint state",
            f"no position of {', '.join(missing)}",
            got=", ".join(message.name) or "no joints",
            remedy="correct state_joints or the topic",
        )
    return np.array([found[joint] for joint in joints], dtype=np.float64)


def capture_time(stamp: Time, *, ros_now_s: float, now_s: float) -> float:
    """Return the `time.monotonic` seconds at which a message was captured.

    now_s: `time.monotonic` now, ros_now_s: the node's clock now. A message without a stamp, or
    with one in the future (clocks of two machines), counts as captured now.
    """
    stamp_s = stamp.sec + stamp.nanosec * 1e-9
    age_s = ros_now_s - stamp_s if stamp_s > 0 else 0.0
    return now_s - max(age_s, 0.0)
