"""Which frames are worth keeping: moving ones, balanced over tasks and episodes.

Idle frames and neighbours in time say the same thing many times over; statistics taken on them
fit one posture of the robot. Everything here is pure and free of random generators: the order of
equals is that of a hash of (seed, episode, frame), the same on every machine and version.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
import numpy.typing as npt

DEFAULT_STRIDE = 3
DEFAULT_MIN_MOTION = 0.01

_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True)
class Candidate:
    """A frame that may be chosen: its position in the source, where it is from, how much it moves."""

    index: int
    task: int
    episode: int
    frame: int
    motion: float


def motion(
    episodes: npt.NDArray[np.int64],
    frames: npt.NDArray[np.int64],
    states: npt.NDArray[np.float32],
    stride: int,
) -> npt.NDArray[np.float64]:
    """Return how far the state moves within ``stride`` frames of each frame, as a share of its range.

    episodes, frames: (n,); states: (n, S) -> (n,). The largest share over the S entries counts;
    entries that never change are left out. The last frames of an episode look backwards.
    """
    span = states.max(axis=0) - states.min(axis=0)
    live = span > 1e-9
    scaled = states[:, live].astype(np.float64) / span[live]
    result = np.zeros(len(states))
    if not live.any():
        return result
    for episode in np.unique(episodes):
        rows = np.flatnonzero(episodes == episode)
        rows = rows[np.argsort(frames[rows], kind="stable")]
        step = min(stride, len(rows) - 1)
        if step:
            moved = np.abs(scaled[rows[step:]] - scaled[rows[:-step]]).max(axis=1)
            result[rows] = np.concatenate([moved, np.repeat(moved[-1], step)])
    return result


def strided(candidates: Sequence[Candidate], stride: int) -> list[Candidate]:
    """Return every ``stride``-th frame of each episode, in time order."""
    kept: list[Candidate] = []
    for members in _group(candidates, [c.episode for c in candidates]).values():
        kept += sorted(members, key=lambda c: c.frame)[::stride]
    return kept


def balanced(candidates: Sequence[Candidate], count: int, seed: int) -> list[int]:
    """Return the positions of at most ``count`` candidates, sorted by (episode, frame).

    Tasks share ``count`` as evenly as they can, the episodes of a task share its part, and within
    an episode the choice is spread over time. Fewer come back only when there are fewer.
    """
    chosen: list[Candidate] = []
    by_task = _group(candidates, [c.task for c in candidates])
    task_quota = shares(count, {task: len(members) for task, members in by_task.items()}, seed)
    for task, members in by_task.items():
        by_episode = _group(members, [c.episode for c in members])
        sizes = {episode: len(rows) for episode, rows in by_episode.items()}
        for episode, quota in shares(task_quota[task], sizes, seed).items():
            chosen += _spread(by_episode[episode], quota, seed)
    return [c.index for c in sorted(chosen, key=lambda c: (c.episode, c.frame))]


def shares(count: int, sizes: Mapping[_Key, int], seed: int) -> dict[_Key, int]:
    """Return how many of ``count`` each group gives: as equal as its size allows, extra ones by hash."""
    quota = dict.fromkeys(sizes, 0)
    left = min(count, sum(sizes.values()))
    while left:
        open_groups = [key for key in sizes if quota[key] < sizes[key]]
        even = left // len(open_groups)
        if even == 0:
            for key in sorted(open_groups, key=lambda k: _rank(seed, k))[:left]:
                quota[key] += 1
            break
        for key in open_groups:
            given = min(even, sizes[key] - quota[key])
            quota[key] += given
            left -= given
    return quota


def _spread(members: Sequence[Candidate], count: int, seed: int) -> list[Candidate]:
    """Return ``count`` frames of one episode: one out of each of ``count`` equal stretches of time."""
    ordered = sorted(members, key=lambda c: c.frame)
    edges = [round(i * len(ordered) / count) for i in range(count + 1)] if count else []
    return [
        min(ordered[low:high], key=lambda c: _rank(seed, c.episode, c.frame))
        for low, high in pairwise(edges)
    ]


def _group(members: Iterable[Candidate], keys: Iterable[_Key]) -> dict[_Key, list[Candidate]]:
    groups: dict[_Key, list[Candidate]] = defaultdict(list)
    for member, key in zip(members, keys, strict=True):
        groups[key].append(member)
    return dict(groups)


def _rank(*parts: object) -> bytes:
    return hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
