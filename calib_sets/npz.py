"""Reading a plain directory of ``*.npz`` files, one observation each: what a robot records with numpy alone.

    np.savez(f"{i:06d}.npz", **observation, episode=episode, frame=i)

Arrays are named by observation keys; ``task`` is text; ``episode`` and ``frame`` are optional (all
files or none: without them the files, sorted by name, are one episode).
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from quantvla.calib_sets.calibration_set import CalibrationSet, FrameTable, assemble
from quantvla.calib_sets.card import RobotSpec, SetSource
from quantvla.calib_sets.observation import (
    STATE_KEY,
    TASK_KEY,
    Observation,
    check_camera,
    check_image_layout,
    check_observation,
    is_camera,
    missing_key,
    read_state,
    read_task,
)
from quantvla.runtime.errors import QuantVLAError, explain
from quantvla.runtime.files import sha256_tree
from quantvla.runtime.manifest import CameraSpec, VectorSpec

EPISODE_KEY = "episode"
FRAME_KEY = "frame"
ACTION_KEY = "action"
_NPY: Any = np.lib.format  # numpy leaves it untyped
_VECTORS = frozenset({STATE_KEY, TASK_KEY, EPISODE_KEY, FRAME_KEY, ACTION_KEY})


@dataclass(frozen=True)
class NpzFrames:
    """Loads the frames of a directory of NPZ files."""

    files: tuple[Path, ...]
    robot: RobotSpec

    def load(self, index: int) -> Observation:
        """Return the observation in file ``index``."""
        path = self.files[index]
        try:
            with np.load(path, allow_pickle=False) as archive:
                observation = {
                    key: archive[key]
                    for key in archive.files
                    if key in (STATE_KEY, TASK_KEY) or is_camera(key, archive[key].ndim)
                }
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            raise _unreadable(path, error) from error
        return check_observation(path, observation, self.robot)


@dataclass(frozen=True)
class _Header:
    """One file without its pixels."""

    robot: RobotSpec
    state: np.ndarray[Any, np.dtype[np.float32]]
    task: str
    episode: int | None
    frame: int | None
    ignored: frozenset[str]


def open_npz(directory: Path, heldout: frozenset[int] | None = None) -> CalibrationSet:
    """Return the set of all ``*.npz`` in ``directory``. Every file is checked here, pixels are not read."""
    files = tuple(sorted(directory.glob("*.npz")))
    headers = [_read_header(path) for path in files]
    robot = headers[0].robot
    for path, header in zip(files, headers, strict=True):
        _check_same(path, header, headers[0], files[0])
    table = FrameTable(
        episodes=tuple(header.episode or 0 for header in headers),
        frames=tuple(i if h.frame is None else h.frame for i, h in enumerate(headers)),
        tasks=tuple(header.task for header in headers),
        states=np.stack([header.state for header in headers]),
    )
    ignored = frozenset[str]().union(*(header.ignored for header in headers))
    return assemble(
        directory,
        directory.resolve().name,
        source=SetSource(
            kind="npz",
            name=directory.resolve().name,
            sha256=sha256_tree(directory),
            ignored=tuple(sorted(ignored)),
        ),
        robot=robot,
        table=table,
        loader=NpzFrames(files, robot),
        heldout=heldout,
    )


def _read_header(path: Path) -> _Header:
    """Return everything but the pixels of one file; only the headers of image arrays are read."""
    small: dict[str, Any] = {}
    cameras: list[CameraSpec] = []
    ignored: set[str] = set()
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                key = member.removesuffix(".npy")
                with archive.open(member) as stream:
                    shape, dtype = _array_header(stream)
                if key not in _VECTORS and is_camera(key, len(shape)):
                    cameras.append(check_image_layout(path, key, shape, dtype))
                elif key not in _VECTORS:
                    ignored.add(key)
                else:
                    with archive.open(member) as stream:
                        small[key] = _NPY.read_array(stream, allow_pickle=False)
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise _unreadable(path, error) from error
    for key in (STATE_KEY, TASK_KEY):
        if key not in small:
            raise missing_key(path, key, {**small, **{camera.key: None for camera in cameras}})
    if not cameras:
        raise explain(
            path, "no camera image", got=", ".join(sorted(small)), remedy="record the cameras"
        )
    state = read_state(path, small[STATE_KEY])
    action = small.get(ACTION_KEY)
    return _Header(
        robot=RobotSpec(
            cameras=tuple(sorted(cameras, key=lambda camera: camera.key)),
            state=VectorSpec(key=STATE_KEY, dim=len(state)),
            action=None
            if action is None or action.size == 0
            else VectorSpec(key=ACTION_KEY, dim=int(action.shape[-1] if action.ndim else 1)),
        ),
        state=state,
        task=read_task(path, small[TASK_KEY]),
        episode=_whole(path, EPISODE_KEY, small),
        frame=_whole(path, FRAME_KEY, small),
        ignored=frozenset(ignored),
    )


def _array_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = _NPY.read_magic(stream)
    read = _NPY.read_array_header_1_0 if version == (1, 0) else _NPY.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype


def _whole(path: Path, key: str, values: dict[str, Any]) -> int | None:
    value = values.get(key)
    if value is None:
        return None
    if value.shape != () or value.dtype.kind not in "iu" or value < 0:
        raise explain(
            f"{path} {key}", "must be a whole number from 0", got=value, remedy="count from 0"
        )
    return int(value)


def _check_same(path: Path, header: _Header, first: _Header, first_path: Path) -> None:
    """Raise if a file has other cameras, state or numbering than the first."""
    found = {camera.key: camera for camera in header.robot.cameras}
    for camera in first.robot.cameras:
        if camera.key not in found:
            raise missing_key(path, camera.key, found)
        check_camera(path, camera, found.pop(camera.key))
    if found:
        raise explain(
            path,
            f"camera {min(found)!r} is not in {first_path.name}",
            remedy="record the same cameras in every file",
        )
    if header.robot.state.dim != first.robot.state.dim:
        raise explain(
            f"{path} {STATE_KEY}",
            f"must have {first.robot.state.dim} entries like {first_path.name}",
            got=header.robot.state.dim,
            remedy="keep one robot per set",
        )
    for key in (EPISODE_KEY, FRAME_KEY):
        if (getattr(header, key) is None) != (getattr(first, key) is None):
            raise explain(
                f"{path} {key}",
                f"is in some files and not in others ({first_path.name} differs)",
                remedy="record it in all files or in none",
            )


def _unreadable(path: Path, error: Exception) -> QuantVLAError:
    return explain(path, f"is not a readable NPZ file ({error})", remedy="record or copy it again")
