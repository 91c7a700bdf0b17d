"""Jerk, steps and jumps at seams on motions with known derivatives."""

from __future__ import annotations

import numpy as np
import pytest

from quantvla.fidelity.smoothness import chunk_smoothness, executed_smoothness, pool


def cubic(start: int, horizon: int = 8) -> np.ndarray:
    t = np.arange(start, start + horizon, dtype=np.float64)
    return np.stack([t**3 / 6, 0 * t], axis=1)


def test_a_cubic_has_constant_jerk() -> None:
    found = chunk_smoothness(np.stack([cubic(0)]), [0], [0], execute=8)
    assert found.jerk == pytest.approx(np.sqrt(0.5))
    assert found.seam is None and found.overlap is None and found.seams == 0


def test_chunks_of_one_motion_join_without_a_jump() -> None:
    chunks = np.stack([cubic(0), cubic(4)])
    found = chunk_smoothness(chunks, [3, 3], [10, 14], execute=4)
    expected = (cubic(4)[0] - cubic(3)[0]) ** 2
    assert found.seams == 1 and found.overlap == pytest.approx(0)
    assert found.seam == pytest.approx(np.sqrt(expected.mean()))


def test_only_near_frames_of_one_episode_make_a_seam() -> None:
    chunks = np.stack([cubic(0), cubic(0) + 1, cubic(0) + 3])
    assert chunk_smoothness(chunks, [0, 1, 2], [0, 2, 4], execute=4).seams == 0
    assert chunk_smoothness(chunks, [0, 0, 0], [0, 5, 10], execute=4).seams == 0
    found = chunk_smoothness(chunks, [0, 0, 1], [0, 4, 5], execute=4)
    assert found.seams == 1


def test_executed_actions_jump_where_a_chunk_begins() -> None:
    actions = np.repeat(np.arange(4.0), 5)[:, None]
    found = executed_smoothness(actions, execute=5)
    assert (found.step, found.seam, found.seams) == (0, 1, 3)
    other = executed_smoothness(np.zeros((20, 1)), execute=5)
    together = pool([found, other])
    assert together.seams == 6 and together.overlap is None
    assert together.seam == pytest.approx(np.sqrt(0.5))


def test_a_short_episode_has_no_seam() -> None:
    found = executed_smoothness(np.ones((3, 2)), execute=5)
    assert found.seam is None and found.seams == 0 and found.jerk == 0
