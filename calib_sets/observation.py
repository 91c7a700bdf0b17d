"""What one observation must look like, and which robot it comes from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from quantvla.calib_sets.card import RobotSpec
from quantvla.runtime.errors import explain, nearest
from quantvla.runtime.manifest import CameraSpec, VectorSpec

STATE_KEY = "observation.state"
TASK_KEY = "task"
CAMERA_PREFIX = "observation.image"

Observation = dict[str, Any]
"""Camera keys: (height, width, 3) uint8 RGB; ``observation.state``: (S,) float32; ``task``: str."""

_KEY = re.compile(r"[A-Za-z0-9_.-]+")


def is_camera(key: str, dimensions: int) -> bool:
    """Return whether an entry is a camera image: its name says so, or it has three dimensions."""
    return key.startswith(CAMERA_PREFIX) or dimensions == 3


def check_image_layout(
    where: object, key: str, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> CameraSpec:
    """Return the camera of an image of this shape and dtype; anything but HWC uint8 RGB is refused."""
    if not _KEY.fullmatch(key):
        raise explain(
            where,
            "a camera key may hold letters, digits, '.', '_' and '-'",
            got=repr(key),
            remedy="rename the camera",
        )
    if len(shape) == 3 and shape[0] in (1, 3) and shape[2] != 3:
        remedy = "give (height, width, 3): `image.transpose(1, 2, 0)`"
    elif dtype.kind == "f":
        remedy = (
            "give the camera's bytes: `(image * 255).round().astype(np.uint8)` if it is in [0, 1]"
        )
    else:
        remedy = "give the camera's RGB picture"
    if len(shape) != 3 or shape[2] != 3 or 0 in shape or dtype != np.uint8:
        raise explain(
            f"{where} {key}",
            "an image must be (height, width, 3) uint8 RGB",
            got=f"{tuple(shape)} {dtype}",
            remedy=remedy,
        )
    return CameraSpec(key=key, height=shape[0], width=shape[1])


def read_state(where: object, value: Any) -> npt.NDArray[np.float32]:
    """Return the state as (S,) float32; one that is not a finite vector of real numbers is refused."""
    state = np.asarray(value)
    if state.dtype.kind not in "fiu" or state.ndim != 1 or state.size == 0:
        raise explain(
            f"{where} {STATE_KEY}",
            "must be a vector of real numbers",
            got=f"{state.shape} {state.dtype}",
            remedy="give one number per joint, shape (S,)",
        )
    state = state.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(state))
    if bad.size:
        raise explain(
            f"{where} {STATE_KEY}",
            f"entry {bad[0]} is not finite",
            got=state[bad[0]],
            remedy="drop this frame or repair the sensor",
        )
    return state


def read_task(where: object, value: Any) -> str:
    """Return the task sentence; anything but a non-empty text is refused."""
    text = value.item() if isinstance(value, np.ndarray) and value.shape == () else value
    if not isinstance(text, str) or not text.strip():
        raise explain(
            f"{where} {TASK_KEY}",
            "must be the instruction as text",
            got=repr(text),
            remedy="give the sentence the policy is told",
        )
    return str(text)


def describe_robot(where: object, observation: Mapping[str, Any]) -> RobotSpec:
    """Return cameras and state of one observation, checked; names and action are unknown."""
    state, _ = required(where, observation)
    cameras = tuple(
        check_image_layout(where, key, value.shape, value.dtype)
        for key, value in sorted(observation.items())
        if isinstance(value, np.ndarray) and is_camera(key, value.ndim)
    )
    if not cameras:
        raise explain(
            where,
            "no camera image",
            got=f"keys {', '.join(sorted(observation))}",
            remedy=f"give at least one '{CAMERA_PREFIX}s.<camera>'",
        )
    return RobotSpec(cameras=cameras, state=VectorSpec(key=STATE_KEY, dim=len(state)))


def required(where: object, observation: Mapping[str, Any]) -> tuple[npt.NDArray[np.float32], str]:
    """Return state and task of an observation; a missing one is an error that names it."""
    for key in (STATE_KEY, TASK_KEY):
        if key not in observation:
            raise missing_key(where, key, observation)
    return read_state(where, observation[STATE_KEY]), read_task(where, observation[TASK_KEY])


def missing_key(where: object, key: str, found: Mapping[str, Any]) -> Exception:
    """Return the error for a key that an observation lacks, with the nearest one it has."""
    return explain(
        where, f"key {key!r} is missing", got=", ".join(sorted(found)), remedy=nearest(key, found)
    )


def check_observation(
    where: object, observation: Mapping[str, Any], robot: RobotSpec
) -> Observation:
    """Return the observation reduced to cameras, state and task, after checking it against ``robot``."""
    state, task = required(where, observation)
    if len(state) != robot.state.dim:
        raise explain(
            f"{where} {STATE_KEY}",
            f"must have {robot.state.dim} entries like the frames before",
            got=len(state),
            remedy="keep one robot per set",
        )
    checked: Observation = {}
    for camera in robot.cameras:
        if camera.key not in observation:
            raise missing_key(where, camera.key, observation)
        image = np.asarray(observation[camera.key])
        found = check_image_layout(where, camera.key, image.shape, image.dtype)
        check_camera(where, camera, found)
        checked[camera.key] = image
    return {**checked, STATE_KEY: state, TASK_KEY: task}


def check_camera(where: object, expected: CameraSpec, found: CameraSpec) -> None:
    """Raise `QuantVLAError` if an image has another size than the camera's other images."""
    if (found.height, found.width) != (expected.height, expected.width):
        raise explain(
            f"{where} {expected.key}",
            f"must be {expected.height}x{expected.width} (height x width) like the frames before",
            got=f"{found.height}x{found.width}",
            remedy="keep one resolution per camera",
        )
