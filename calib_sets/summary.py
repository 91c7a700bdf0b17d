"""What a person wants to know about a calibration set before using it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec

from quantvla.calib_sets.calibration_set import CalibrationSet
from quantvla.calib_sets.card import PARTS, Motion, Part, RobotSpec, Selection, SetSource, Split

ADVISED_FRAMES = 128


class PartSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One part: counts, frames per task, and the share of frames in which the robot moves."""

    frames: int
    episodes: int
    moving: float
    tasks: dict[str, int]


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """A calibration set in numbers. ``size_bytes`` is that of the directory it was read from."""

    name: str
    source: SetSource
    robot: RobotSpec
    split: Split
    selection: Selection | None
    motion: Motion
    parts: dict[Part, PartSummary]
    frames: int
    size_bytes: int
    checksum: str
    notes: tuple[str, ...]


def summarize(calibration: CalibrationSet, path: Path) -> Summary:
    """Return the summary of a set that was opened at ``path``; no image is read."""
    card = calibration.card
    parts = {name: _summarize_part(calibration.part(name)) for name in PARTS}
    return Summary(
        name=card.name,
        source=card.source,
        robot=card.robot,
        split=card.split,
        selection=card.selection,
        motion=card.motion,
        parts=parts,
        frames=len(calibration),
        size_bytes=sum(p.stat().st_size for p in path.rglob("*") if p.is_file()),
        checksum=calibration.checksum,
        notes=_notes(calibration, parts["calibration"]),
    )


def _summarize_part(part: CalibrationSet) -> PartSummary:
    card, entries = part.card, part.entries
    counts = Counter(card.tasks[entry.task] for entry in entries)
    moving = sum(entry.motion >= card.motion.min_motion for entry in entries)
    return PartSummary(
        frames=len(entries),
        episodes=len({entry.episode for entry in entries}),
        moving=round(moving / len(entries), 4),
        tasks={task: counts[task] for task in card.tasks},
    )


def _notes(calibration: CalibrationSet, part: PartSummary) -> tuple[str, ...]:
    """Return what is unusual about the set, each in one sentence."""
    notes = []
    if part.frames < ADVISED_FRAMES:
        notes.append(
            f"{part.frames} calibration frames; {ADVISED_FRAMES} or more give stable ranges"
        )
    if calibration.card.split.method == "time":
        notes.append(calibration.card.split.detail)
    absent = [task for task, count in part.tasks.items() if count == 0]
    if absent:
        notes.append(f"no calibration frames of: {', '.join(absent)}")
    if calibration.card.source.ignored:
        notes.append(f"not part of an observation: {', '.join(calibration.card.source.ignored)}")
    return tuple(notes)
