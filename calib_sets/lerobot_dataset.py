"""Reading a LeRobotDataset v3 directory with lerobot itself, from the disk only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantvla.calib_sets.calibration_set import CalibrationSet, FrameTable, assemble
from quantvla.calib_sets.card import RobotSpec, SetSource
from quantvla.calib_sets.observation import STATE_KEY, TASK_KEY, Observation, check_observation
from quantvla.runtime.errors import QuantVLAError, explain, nearest
from quantvla.runtime.files import sha256_tree
from quantvla.runtime.manifest import CameraSpec, VectorSpec

INFO_FILE = "meta/info.json"
ACTION_KEY = "action"
_HELDOUT_SPLITS = ("heldout", "held_out", "test", "val", "valid", "validation", "eval")
_NUMBERING = {"timestamp", "frame_index", "episode_index", "index", "task_index"}


@dataclass(frozen=True)
class LeRobotFrames:
    """Loads frames of a LeRobotDataset; pictures come back as the bytes the camera gave."""

    path: Path
    dataset: Any
    robot: RobotSpec

    def load(self, index: int) -> Observation:
        """Return the observation of frame ``index`` of the dataset."""
        where = f"{self.path} frame {index}"
        try:
            item = self.dataset[index]
        except Exception as error:  # decoders raise whatever they like
            raise explain(
                where, f"lerobot cannot read it ({error})", remedy="copy the dataset again"
            ) from error
        observation: Observation = {
            camera.key: _to_uint8(item[camera.key]) for camera in self.robot.cameras
        }
        observation[STATE_KEY] = np.asarray(item[STATE_KEY]).reshape(-1)
        observation[TASK_KEY] = item[TASK_KEY]
        return check_observation(where, observation, self.robot)


def open_lerobot(directory: Path, heldout: frozenset[int] | None = None) -> CalibrationSet:
    """Return the set of all frames of a LeRobotDataset v3 directory.

    ``splits`` of ``meta/info.json`` named heldout, test or validation give the held-out episodes.
    Raises `QuantVLAError` when lerobot is not installed, or for files that are missing or not v3.
    """
    info = _read_info(directory)
    dataset = _open_dataset(directory)
    robot = _robot(directory, dataset.meta)
    columns = dataset.hf_dataset.select_columns(
        ["episode_index", "frame_index", "task_index", STATE_KEY]
    ).with_format("numpy")[:]
    names = [str(task) for task in dataset.meta.tasks.index]
    states = np.stack([np.asarray(s, dtype=np.float32).reshape(-1) for s in columns[STATE_KEY]])
    episodes = tuple(int(e) for e in columns["episode_index"])
    frames = tuple(int(f) for f in columns["frame_index"])
    bad = np.flatnonzero(~np.isfinite(states).all(axis=1))
    if bad.size:
        raise explain(
            f"{directory} episode {episodes[bad[0]]} frame {frames[bad[0]]} {STATE_KEY}",
            "is not finite",
            got=states[bad[0]],
            remedy="drop this episode",
        )
    ignored = set(dataset.meta.features) - _NUMBERING - {STATE_KEY, ACTION_KEY}
    return assemble(
        directory,
        directory.resolve().name,
        source=SetSource(
            kind="lerobot",
            name=directory.resolve().name,
            sha256=_checksum(directory),
            ignored=tuple(sorted(ignored - {camera.key for camera in robot.cameras})),
        ),
        robot=robot,
        table=FrameTable(
            episodes=episodes,
            frames=frames,
            tasks=tuple(names[int(t)] for t in columns["task_index"]),
            states=states,
        ),
        loader=LeRobotFrames(directory, dataset, robot),
        heldout=heldout,
        source_heldout=_named_split(directory, info),
    )


def _read_info(directory: Path) -> dict[str, Any]:
    path = directory / INFO_FILE
    try:
        info = json.loads(path.read_bytes())
        version = str(info["codebase_version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise explain(
            path, f"is not the info of a LeRobotDataset ({error})", remedy="copy the dataset again"
        ) from error
    if not version.startswith("v3"):
        raise explain(
            path,
            "only LeRobotDataset v3 is read",
            got=version,
            remedy="convert it with `python -m lerobot.scripts.convert_dataset_v21_to_v30`",
        )
    return dict(info)


def _open_dataset(directory: Path) -> Any:
    """Return the LeRobotDataset; every file it names must be on the disk, nothing is downloaded."""
    try:
        from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
        from lerobot.datasets.lerobot_dataset import LeRobotDataset
    except ImportError as error:
        raise explain(
            directory,
            f"reading a LeRobotDataset needs lerobot ({error})",
            remedy="run `pip install quantvla[compile]` or give a directory of NPZ files",
        ) from error
    repo_id = f"local/{directory.resolve().name}"
    try:
        with _offline():
            meta = LeRobotDatasetMetadata(repo_id, root=directory)
            _check_data_files(directory, meta)
            # One decoder everywhere: the same video gives the same pixels on every machine.
            return LeRobotDataset(repo_id, root=directory, return_uint8=True, video_backend="pyav")
    except QuantVLAError:
        raise
    except Exception as error:  # pyarrow, datasets and the hub client each have their own
        reason = " ".join(str(error).split())[:300]
        raise explain(
            directory,
            f"lerobot cannot open this dataset ({type(error).__name__}: {reason})",
            remedy="copy it again or record it again",
        ) from error


@contextmanager
def _offline() -> Iterator[None]:
    """Forbid the hub client the network: a missing file must be an error, not a download."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _check_data_files(directory: Path, meta: Any) -> None:
    for episode in range(meta.total_episodes):
        needed = [meta.get_data_file_path(episode)]
        needed += [meta.get_video_file_path(episode, key) for key in meta.video_keys]
        for name in needed:
            if not (directory / name).is_file():
                raise explain(
                    directory / name,
                    f"needed by episode {episode} but missing",
                    remedy="copy the dataset again",
                )


def _robot(directory: Path, meta: Any) -> RobotSpec:
    features: Mapping[str, Mapping[str, Any]] = meta.features
    if STATE_KEY not in features:
        raise explain(
            directory,
            f"key {STATE_KEY!r} is missing",
            got=", ".join(sorted(features)),
            remedy=nearest(STATE_KEY, features),
        )
    cameras = [key for key in meta.camera_keys if key not in meta.depth_keys]
    if not cameras:
        raise explain(
            directory, "no colour camera", got=", ".join(sorted(features)), remedy="record one"
        )
    return RobotSpec(
        cameras=tuple(_camera(key, features[key]) for key in sorted(cameras)),
        state=_vector(STATE_KEY, features[STATE_KEY]),
        action=_vector(ACTION_KEY, features[ACTION_KEY]) if ACTION_KEY in features else None,
    )


def _camera(key: str, feature: Mapping[str, Any]) -> CameraSpec:
    shape = [int(size) for size in feature["shape"]]
    first = str((feature.get("names") or ["height"])[0])
    height, width = shape[1:] if first.startswith("channel") else shape[:2]
    return CameraSpec(key=key, height=height, width=width)


def _vector(key: str, feature: Mapping[str, Any]) -> VectorSpec:
    """Return length and entry names; lerobot stores them as a list or as {group: list}."""
    dim = int(np.prod(feature["shape"]))
    names = feature.get("names")
    if isinstance(names, Mapping):
        names = next(iter(names.values()), None)
    named = tuple(map(str, names)) if isinstance(names, (list, tuple)) else ()
    return VectorSpec(key=key, dim=dim, names=named if len(named) == dim else ())


def _to_uint8(image: Any) -> npt.NDArray[np.uint8]:
    """Return lerobot's tensor (3, H, W), float in [0, 1] or uint8, as (H, W, 3) uint8."""
    array = np.asarray(image)
    if array.dtype != np.uint8:
        array = np.rint(array * 255.0).astype(np.uint8)
    return np.ascontiguousarray(array.transpose(1, 2, 0))


def _named_split(directory: Path, info: Mapping[str, Any]) -> frozenset[int] | None:
    """Return the episodes of splits such as ``{"heldout": "90:100"}``, None when there are none."""
    held: set[int] = set()
    for name, span in (info.get("splits") or {}).items():
        if name not in _HELDOUT_SPLITS:
            continue
        try:
            start, stop = (int(edge) for edge in str(span).split(":"))
        except ValueError as error:
            raise explain(
                directory / INFO_FILE,
                f"split {name!r} must be 'first:end'",
                got=repr(span),
                remedy="give a range of episodes",
            ) from error
        held.update(range(start, stop))
    return frozenset(held) or None


def _checksum(directory: Path) -> str:
    """Return one SHA-256 over ``meta/`` and ``data/``, and names and sizes of the videos.

    Frames of image datasets are in ``data/``; hashing gigabytes of video to read 300 frames of
    them would take longer than calibration.
    """
    digest = sha256()
    for folder in ("meta", "data"):
        digest.update(bytes.fromhex(sha256_tree(directory / folder)))
    for path in sorted(p for p in (directory / "videos").rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(directory).as_posix()} {path.stat().st_size}\n".encode())
    return digest.hexdigest()
