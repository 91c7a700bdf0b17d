"""How smooth the motion is that a policy's chunks make: inside a chunk, and where one follows another.

Two sources of the same figures: chunks predicted for recorded frames of one episode, and the
actions that were run in a closed loop. Both compare the jump at a seam (last executed action of a
chunk to the first of the next) with the step between neighbouring actions inside a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import msgspec
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


class Smoothness(msgspec.Struct, frozen=True, kw_only=True):
    """``jerk``: RMS third difference of the actions inside a chunk, per step cubed. ``step``: RMS
    first difference inside a chunk. ``seam``: RMS jump from the last executed action of a chunk to
    the first of the next; ``overlap``: RMS difference of two chunks on the steps that both
    predict. None where there is no such pair. ``seams``: how many there were.
    """

    jerk: float
    step: float
    seam: float | None
    overlap: float | None
    seams: int


def chunk_smoothness(
    chunks: Array, episodes: Sequence[int], frames: Sequence[int], *, execute: int
) -> Smoothness:
    """Return the smoothness of chunks predicted at recorded frames.

    chunks: (frames, horizon, dim). Two frames of an episode make a seam when the later one is
    at most ``execute`` steps after the earlier one: the earlier chunk is left at that step.
    """
    run = chunks[:, :execute].astype(np.float64)
    pairs = _neighbours(episodes, frames, execute)
    jumps = [chunks[b][0].astype(np.float64) - chunks[a][gap - 1] for a, b, gap in pairs]
    shared = [chunks[a][gap:].astype(np.float64) - chunks[b][:-gap] for a, b, gap in pairs]
    return Smoothness(
        jerk=_rms(np.diff(run, n=3, axis=1)),
        step=_rms(np.diff(run, axis=1)),
        seam=_rms(np.stack(jumps)) if jumps else None,
        overlap=_rms(np.concatenate(shared)) if shared else None,
        seams=len(pairs),
    )


def executed_smoothness(actions: Array, *, execute: int) -> Smoothness:
    """Return the smoothness of the actions that were run, (steps, dim), a new chunk every ``execute`` steps.

    The jerk here runs over seams too: it is that of the motion.
    """
    steps = np.diff(actions.astype(np.float64), axis=0)
    at_seam = np.arange(1, len(actions)) % execute == 0
    seams, inside = steps[at_seam], steps[~at_seam]
    return Smoothness(
        jerk=_rms(np.diff(actions.astype(np.float64), n=3, axis=0)),
        step=_rms(inside),
        seam=_rms(seams) if len(seams) else None,
        overlap=None,
        seams=len(seams),
    )


def pool(parts: Sequence[Smoothness]) -> Smoothness:
    """Return the RMS over ``parts`` (at least one): each counted the same, seams as many times as it has."""
    return Smoothness(
        jerk=_rms(np.array([part.jerk for part in parts])),
        step=_rms(np.array([part.step for part in parts])),
        seam=_weighted([(part.seam, part.seams) for part in parts]),
        overlap=_weighted([(part.overlap, part.seams) for part in parts]),
        seams=sum(part.seams for part in parts),
    )


def _weighted(values: Sequence[tuple[float | None, int]]) -> float | None:
    """Return the RMS of the values that are known, each counted so many times; None if none is."""
    known = [(value, count) for value, count in values if value is not None]
    total = sum(count for _, count in known)
    return float(np.sqrt(sum(v**2 * n for v, n in known) / total)) if total else None


def _neighbours(
    episodes: Sequence[int], frames: Sequence[int], execute: int
) -> list[tuple[int, int, int]]:
    """Return (earlier, later, steps between) for frames that follow each other within ``execute`` steps."""
    order = sorted(range(len(frames)), key=lambda i: (episodes[i], frames[i]))
    return [
        (a, b, frames[b] - frames[a])
        for a, b in pairwise(order)
        if episodes[a] == episodes[b] and 1 <= frames[b] - frames[a] <= execute
    ]


def _rms(values: NDArray[np.floating]) -> float:
    return float(np.sqrt(np.square(values.astype(np.float64)).mean())) if values.size else 0.0
