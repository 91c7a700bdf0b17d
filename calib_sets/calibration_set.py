"""A calibration set in memory: the card, and frames that are read when they are asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from quantvla.calib_sets.card import (
    MIN_FRAMES,
    Card,
    FrameEntry,
    Motion,
    Part,
    RobotSpec,
    Selection,
    SetSource,
    change_card,
    make_card,
    subset_checksum,
)
from quantvla.calib_sets.observation import Observation
from quantvla.calib_sets.selection import (
    DEFAULT_MIN_MOTION,
    DEFAULT_STRIDE,
    Candidate,
    balanced,
    motion,
    strided,
)
from quantvla.calib_sets.split import split_frames
from quantvla.runtime.errors import explain, nearest


class FrameLoader(Protocol):
    """Where the pixels are."""

    def load(self, index: int) -> Observation:
        """Return the observation at ``index`` of the source. Raises `QuantVLAError` if it is broken."""
        ...


@dataclass(frozen=True)
class Frame:
    """One recorded moment: what the robot saw, and where in the recording it is."""

    observation: Observation
    episode: int
    frame: int
    task: str
    part: Part


@dataclass(frozen=True)
class FrameTable:
    """Everything about the frames of a source but the pixels; entry i of each belongs to frame i.

    states: (n, S) float32.
    """

    episodes: tuple[int, ...]
    frames: tuple[int, ...]
    tasks: tuple[str, ...]
    states: npt.NDArray[np.float32]


@dataclass(frozen=True)
class CalibrationSet:
    """Frames of a source, lazily read. Made by `open_set`; ``card`` describes the whole set."""

    card: Card
    entries: tuple[FrameEntry, ...]
    positions: tuple[int, ...]
    loader: FrameLoader

    @property
    def robot(self) -> RobotSpec:
        """Cameras, state and action of the robot."""
        return self.card.robot

    @property
    def checksum(self) -> str:
        """SHA-256 of exactly these frames: that of the card for the whole set, another one for a part."""
        return subset_checksum(self.card, self.entries)

    def part(self, name: Part) -> CalibrationSet:
        """Return the frames of one part, ``calibration`` or ``heldout``. Never empty, never overlapping."""
        rows = [row for row, entry in enumerate(self.entries) if entry.part == name]
        if not rows:
            raise explain(
                self.card.name,
                "no such part",
                got=repr(name),
                remedy="choose calibration or heldout",
            )
        return self._rows(rows)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Frame:
        entry, position = self.entries[index], self.positions[index]
        return Frame(
            observation=self.loader.load(position),
            episode=entry.episode,
            frame=entry.frame,
            task=self.card.tasks[entry.task],
            part=entry.part,
        )

    def __iter__(self) -> Iterator[Frame]:
        for index in range(len(self)):
            yield self[index]

    def _rows(self, rows: Sequence[int]) -> CalibrationSet:
        return replace(
            self,
            entries=tuple(self.entries[row] for row in rows),
            positions=tuple(self.positions[row] for row in rows),
        )


def assemble(
    where: object,
    name: str,
    *,
    source: SetSource,
    robot: RobotSpec,
    table: FrameTable,
    loader: FrameLoader,
    heldout: Collection[int] | None = None,
    source_heldout: Collection[int] | None = None,
) -> CalibrationSet:
    """Return the set of all frames of a source: split into parts, movement measured, checked."""
    if len(table.frames) < MIN_FRAMES:
        raise explain(
            where,
            f"a calibration set needs at least {MIN_FRAMES} frames (128 or more are advised)",
            got=len(table.frames),
            remedy="record more frames",
        )
    parts, split = split_frames(
        where,
        table.episodes,
        table.frames,
        table.tasks,
        given=heldout,
        source=source_heldout,
    )
    moved = _measure(table.episodes, table.frames, table.states, DEFAULT_STRIDE)
    tasks = tuple(sorted(set(table.tasks)))
    positions: list[int] = []
    entries: list[FrameEntry] = []
    for row in sorted(range(len(parts)), key=lambda r: (table.episodes[r], table.frames[r])):
        part = parts[row]
        if part is None:
            continue
        positions.append(row)
        entries.append(
            FrameEntry(
                episode=table.episodes[row],
                frame=table.frames[row],
                task=tasks.index(table.tasks[row]),
                part=part,
                motion=moved[row],
                state=shortest(table.states[row]),
            )
        )
    card = make_card(
        name,
        source=source,
        robot=robot,
        split=split,
        selection=None,
        motion=Motion(stride=DEFAULT_STRIDE, min_motion=DEFAULT_MIN_MOTION),
        tasks=tasks,
        frames=tuple(entries),
        where=where,
    )
    return CalibrationSet(card=card, entries=card.frames, positions=tuple(positions), loader=loader)


def select(calibration: CalibrationSet, selection: Selection) -> CalibrationSet:
    """Return the frames that ``selection`` asks for: moving ones, balanced, each part for itself.

    Fewer than asked come back when there are no more; the card's ``selection`` keeps what was
    asked. A set that was selected before is only balanced again: its frames are no longer
    neighbours in time, so stride and movement have no meaning for it.
    """
    fresh = calibration.card.selection is None
    entries = calibration.entries
    moved = [entry.motion for entry in entries]
    if fresh:
        states = np.array([entry.state for entry in entries], dtype=np.float32)
        moved = _measure(
            [e.episode for e in entries], [e.frame for e in entries], states, selection.stride
        )
    rows: list[int] = []
    for part, count in (("calibration", selection.frames), ("heldout", selection.heldout_frames)):
        candidates = [
            Candidate(row, entry.task, entry.episode, entry.frame, moved[row])
            for row, entry in enumerate(entries)
            if entry.part == part
        ]
        if fresh:
            candidates = strided(candidates, selection.stride)
            candidates = [c for c in candidates if c.motion >= selection.min_motion]
        rows += balanced(candidates, count, selection.seed)
    rows.sort(key=lambda row: (entries[row].episode, entries[row].frame))
    chosen = calibration._rows(rows)
    card, measured = (
        calibration.card,
        Motion(stride=selection.stride, min_motion=selection.min_motion),
    )
    new = change_card(
        card,
        f"{card.name} after dropping idle frames",
        selection=selection,
        motion=measured if fresh else card.motion,
        frames=tuple(
            msgspec.structs.replace(entry, motion=moved[row])
            for entry, row in zip(chosen.entries, rows, strict=True)
        ),
    )
    return replace(chosen, card=new, entries=new.frames)


def of_tasks(calibration: CalibrationSet, tasks: Collection[str]) -> CalibrationSet:
    """Return the frames whose instruction is one of ``tasks``; everything if none is named.

    For a policy that knows some of a recording's tasks. Raises `QuantVLAError` for an instruction that the set lacks.
    """
    known = calibration.card.tasks
    for task in tasks:
        if task not in known:
            raise explain(
                calibration.card.name,
                "has no frames of this task",
                got=repr(task),
                remedy=nearest(task, known),
            )
    if not tasks:
        return calibration
    kept = tuple(task for task in known if task in tasks)
    entries = calibration.entries
    chosen = calibration._rows(
        [row for row, entry in enumerate(entries) if known[entry.task] in kept]
    )
    new = change_card(
        calibration.card,
        f"{calibration.card.name} of {len(kept)} tasks",
        tasks=kept,
        frames=tuple(
            msgspec.structs.replace(entry, task=kept.index(known[entry.task]))
            for entry in chosen.entries
        ),
    )
    return replace(chosen, card=new, entries=new.frames)


def limit(
    calibration: CalibrationSet, *, frames: int = 256, heldout_frames: int = 64, seed: int = 0
) -> CalibrationSet:
    """Return at most so many frames of each part; a set that is small enough comes back as it is."""
    counts = {part: len(calibration.part(part)) for part in ("calibration", "heldout")}
    if counts["calibration"] <= frames and counts["heldout"] <= heldout_frames:
        return calibration
    return select(calibration, Selection(frames=frames, heldout_frames=heldout_frames, seed=seed))


def shortest(state: npt.NDArray[np.float32]) -> tuple[float, ...]:
    """Return the entries as the shortest decimals that give the same float32 back."""
    return tuple(float(str(value)) for value in state.astype(np.float32))


def _measure(
    episodes: Sequence[int],
    frames: Sequence[int],
    states: npt.NDArray[np.float32],
    stride: int,
) -> list[float]:
    moved = motion(np.asarray(episodes), np.asarray(frames), states, stride)
    return [round(float(value), 4) for value in moved]
