"""The card of a calibration set: what ``card.json`` holds, and what makes it a consistent one.

A card says where the frames came from, which robot saw them, which part each one belongs to and
what its bytes are, so that a set can be copied, checked and named in a checkpoint by one hash.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

import msgspec

from quantvla.runtime.errors import explain
from quantvla.runtime.manifest import CameraSpec, VectorSpec

SCHEMA_VERSION = 1
MIN_FRAMES = 4

Part = Literal["calibration", "heldout"]
PARTS: tuple[Part, ...] = ("calibration", "heldout")

PositiveInt = Annotated[int, msgspec.Meta(gt=0)]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
_IMAGE_NAME = re.compile(r"images/[A-Za-z0-9_.-]+\.(jpg|png)")


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all parts of a card: immutable, and an unknown key is an error."""


class RobotSpec(_Strict, frozen=True, kw_only=True):
    """What the robot of a set sees and does; ``action`` is null when the source has none."""

    cameras: tuple[CameraSpec, ...]
    state: VectorSpec
    action: VectorSpec | None = None


class SetSource(_Strict, frozen=True, kw_only=True):
    """Where the frames came from.

    ``kind`` is ``lerobot``, ``npz`` or what a recorder was told; ``name`` a directory name, a
    repository id or a simulator; ``sha256`` covers the source's files (null for a live
    recording); ``ignored`` are features of the source that an observation does not carry.
    """

    kind: str
    name: str
    sha256: Sha256 | None = None
    ignored: tuple[str, ...] = ()


class Split(_Strict, frozen=True, kw_only=True):
    """How frames were divided into parts.

    ``source``: the source names its held-out episodes; ``given``: the caller did; ``episodes``:
    the last episodes of each task; ``time``: one episode only, its end is held out after a gap.
    """

    method: Literal["source", "given", "episodes", "time"]
    detail: str


class Selection(_Strict, frozen=True, kw_only=True):
    """Which frames to keep: counts of both parts, and what makes a frame worth keeping.

    Every ``stride``-th frame of an episode is a candidate; it is dropped as idle when no entry
    of the state moves by ``min_motion`` of its range within ``stride`` frames.
    """

    frames: PositiveInt = 256
    heldout_frames: PositiveInt = 64
    stride: PositiveInt = 3
    seed: int = 0
    min_motion: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.01


class Motion(_Strict, frozen=True, kw_only=True):
    """How `FrameEntry.motion` was measured: over how many frames, and from where a frame moves."""

    stride: PositiveInt
    min_motion: float


class ImageFile(_Strict, frozen=True, kw_only=True):
    """One picture: its path inside the set and the SHA-256 of its bytes."""

    file: str
    sha256: Sha256


class FrameEntry(_Strict, frozen=True, kw_only=True):
    """One frame without its pixels.

    ``motion`` is the largest movement of any entry of the state, as a share of that entry's range
    in the set. ``images`` maps camera key to file; it is empty while the frames still live in a
    LeRobotDataset or in NPZ files.
    """

    episode: int
    frame: int
    task: int
    part: Part
    motion: float
    state: tuple[float, ...]
    images: dict[str, ImageFile] = {}


class Card(_Strict, frozen=True, kw_only=True):
    """The content of ``card.json``. ``checksum`` covers robot, tasks, frames and their bytes."""

    schema_version: int
    name: str
    source: SetSource
    robot: RobotSpec
    split: Split
    selection: Selection | None
    motion: Motion
    tasks: tuple[str, ...]
    episodes: dict[Part, tuple[int, ...]]
    frames: tuple[FrameEntry, ...]
    checksum: Sha256


def make_card(
    name: str,
    *,
    source: SetSource,
    robot: RobotSpec,
    split: Split,
    selection: Selection | None,
    motion: Motion,
    tasks: tuple[str, ...],
    frames: tuple[FrameEntry, ...],
    where: object,
) -> Card:
    """Return the card of these frames, episodes and checksum filled in, after checking it."""
    card = Card(
        schema_version=SCHEMA_VERSION,
        name=name,
        source=source,
        robot=robot,
        split=split,
        selection=selection,
        motion=motion,
        tasks=tasks,
        episodes=_episodes(frames),
        frames=frames,
        checksum=_content_checksum(source, robot, tasks, frames),
    )
    check_card(card, where)
    return card


def change_card(card: Card, where: object, **changes: Any) -> Card:
    """Return ``card`` with some of its fields changed, episodes and checksum made anew, checked."""
    new = msgspec.structs.replace(card, **changes)
    return make_card(
        new.name,
        source=new.source,
        robot=new.robot,
        split=new.split,
        selection=new.selection,
        motion=new.motion,
        tasks=new.tasks,
        frames=new.frames,
        where=where,
    )


def check_card(card: Card, where: object) -> None:
    """Raise `QuantVLAError` unless both parts are there, disjoint, and every frame fits the robot."""
    counts = Counter(entry.part for entry in card.frames)
    if len(card.frames) < MIN_FRAMES:
        raise explain(
            where,
            f"a calibration set needs at least {MIN_FRAMES} frames (128 or more are advised)",
            got=len(card.frames),
            remedy="record more frames",
        )
    for part in PARTS:
        least = 2 if part == "calibration" else 1
        if counts[part] < least:
            raise explain(
                where,
                f"the {part} part needs at least {least} frames",
                got=counts[part],
                remedy="record more frames or another episode",
            )
    _check_disjoint(card, where)
    for index, entry in enumerate(card.frames):
        _check_entry(card, entry, f"{where} frame {index}")


def _check_disjoint(card: Card, where: object) -> None:
    seen = Counter((entry.episode, entry.frame) for entry in card.frames)
    twice = next((key for key, count in seen.items() if count > 1), None)
    if twice is not None:
        raise explain(
            where,
            f"episode {twice[0]} frame {twice[1]} occurs more than once",
            remedy="give each frame of an episode its own number",
        )
    if card.episodes != _episodes(card.frames):
        raise explain(
            where, "the list of episodes does not fit the frames", remedy="build the set again"
        )
    shared = set(card.episodes["calibration"]) & set(card.episodes["heldout"])
    if shared and card.split.method != "time":
        raise explain(
            where,
            "calibration and heldout share episodes, verification would be meaningless",
            got=sorted(shared)[:5],
            remedy="build the set again",
        )


def _check_entry(card: Card, entry: FrameEntry, where: str) -> None:
    state = card.robot.state
    if len(entry.state) != state.dim:
        raise explain(
            where,
            f"{state.key} must have {state.dim} entries",
            got=len(entry.state),
            remedy="record the set again",
        )
    if not 0 <= entry.task < len(card.tasks):
        raise explain(where, "unknown task number", got=entry.task, remedy="record the set again")
    for key, image in entry.images.items():
        if not _IMAGE_NAME.fullmatch(image.file) or ".." in PurePosixPath(image.file).parts:
            raise explain(
                f"{where} {key}",
                "an image must lie in images/ of the set",
                got=image.file,
                remedy="build the set again",
            )


def subset_checksum(card: Card, frames: tuple[FrameEntry, ...]) -> str:
    """Return one SHA-256 over source, robot, tasks, and ``frames`` with the hashes of their images.

    Of all frames of the card it is the card's own ``checksum``.
    """
    return _content_checksum(card.source, card.robot, card.tasks, frames)


def _content_checksum(
    source: SetSource, robot: RobotSpec, tasks: tuple[str, ...], frames: tuple[FrameEntry, ...]
) -> str:
    """Return one SHA-256 over source, robot, tasks, and frames with the hashes of their images."""
    return hashlib.sha256(msgspec.json.encode((source, robot, tasks, frames))).hexdigest()


def _episodes(frames: tuple[FrameEntry, ...]) -> dict[Part, tuple[int, ...]]:
    return {
        part: tuple(sorted({entry.episode for entry in frames if entry.part == part}))
        for part in PARTS
    }
