"""Which frames calibrate and which verify: by episode, so that neighbours in time never face each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

from quantvla.calib_sets.card import MIN_FRAMES, Part, Split
from quantvla.runtime.errors import explain

HELDOUT_SHARE = 0.2
GAP_SHARE = 0.1


def split_frames(
    where: object,
    episodes: Sequence[int],
    frames: Sequence[int],
    tasks: Sequence[str],
    *,
    given: Collection[int] | None = None,
    source: Collection[int] | None = None,
) -> tuple[list[Part | None], Split]:
    """Return the part of every frame (None: in neither) and how the split was made.

    ``given`` are held-out episodes that the caller names, ``source`` those that the source names;
    without either, the last 20 % of the episodes of each task are held out. A single episode is
    cut in time: its last 20 % are held out and the 10 % before them belong to neither part,
    because frames on both sides of a plain cut would show the same moment twice.
    """
    known = set(episodes)
    if given is not None:
        _check_given(where, known, set(given))
        numbers = ", ".join(map(str, sorted(given)))
        return _by_episode(episodes, set(given)), Split(
            method="given", detail=f"held-out episodes {numbers}"
        )
    if source is not None and set(source) & known and known - set(source):
        held = set(source) & known
        return _by_episode(episodes, held), Split(
            method="source", detail=f"the source names {len(held)} held-out episodes"
        )
    if len(known) == 1:
        return _by_time(where, frames)
    held = _last_of_each_task(episodes, frames, tasks)
    return _by_episode(episodes, held), Split(
        method="episodes",
        detail=f"last {HELDOUT_SHARE:.0%} of the episodes of each task: {len(held)} of {len(known)}",
    )


def _check_given(where: object, known: set[int], given: set[int]) -> None:
    unknown = given - known
    if unknown or not given or given == known:
        raise explain(
            where,
            "held-out episodes must be some, not all, of the source's episodes",
            got=sorted(unknown or given)[:5],
            remedy=f"choose from {min(known)} to {max(known)}",
        )


def _by_episode(episodes: Sequence[int], held: set[int]) -> list[Part | None]:
    return ["heldout" if episode in held else "calibration" for episode in episodes]


def _last_of_each_task(
    episodes: Sequence[int], frames: Sequence[int], tasks: Sequence[str]
) -> set[int]:
    """Return the last 20 % of each task's episodes; tasks with one episode only give none."""
    first: dict[int, tuple[int, str]] = {}
    for episode, frame, task in zip(episodes, frames, tasks, strict=True):
        if episode not in first or frame < first[episode][0]:
            first[episode] = (frame, task)
    by_task: dict[str, list[int]] = defaultdict(list)
    for episode in sorted(first):
        by_task[first[episode][1]].append(episode)
    held: set[int] = set()
    for members in by_task.values():
        if len(members) > 1:
            held.update(members[-_heldout_count(len(members)) :])
    return held or set(sorted(first)[-_heldout_count(len(first)) :])


def _heldout_count(total: int) -> int:
    return max(1, round(HELDOUT_SHARE * total))


def _by_time(where: object, frames: Sequence[int]) -> tuple[list[Part | None], Split]:
    count = len(frames)
    if count < MIN_FRAMES:
        raise explain(
            where,
            f"a calibration set needs at least {MIN_FRAMES} frames (128 or more are advised)",
            got=count,
            remedy="record more frames",
        )
    held, gap = _heldout_count(count), max(1, round(GAP_SHARE * count))
    ordered = sorted(range(count), key=lambda row: frames[row])
    parts: list[Part | None] = [None] * count
    for position, row in enumerate(ordered):
        if position < count - held - gap:
            parts[row] = "calibration"
        elif position >= count - held:
            parts[row] = "heldout"
    return parts, Split(
        method="time",
        detail=f"one episode only: its last {held} frames are held out after a gap of {gap}; "
        "record a second episode for an independent check",
    )
