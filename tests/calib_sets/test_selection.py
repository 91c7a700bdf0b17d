"""Selection is pure: balance, movement and determinism need no files."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from quantvla.calib_sets.selection import Candidate, balanced, motion, shares, strided


def candidates(sizes: dict[tuple[int, int], int]) -> list[Candidate]:
    """Return candidates for {(task, episode): frames}."""
    rows = [(task, ep, frame) for (task, ep), n in sizes.items() for frame in range(n)]
    return [Candidate(i, task, ep, frame, 1.0) for i, (task, ep, frame) in enumerate(rows)]


def test_motion_is_the_largest_share_of_a_range_and_stays_inside_an_episode() -> None:
    episodes = np.array([0, 0, 0, 0, 1, 1])
    frames = np.array([0, 1, 2, 3, 0, 1])
    states = np.array(
        [[0, 5, 1], [1, 5, 1], [1, 5, 1], [1, 5, 2], [0, 5, 3], [4, 5, 3]], dtype=np.float32
    )
    moved = motion(episodes, frames, states, stride=1)
    np.testing.assert_allclose(moved, [0.25, 0.0, 0.5, 0.5, 1.0, 1.0])


def test_motion_over_a_stride_longer_than_the_episode() -> None:
    moved = motion(np.zeros(3, int), np.arange(3), np.array([[0.0], [1], [4]], np.float32), 50)
    np.testing.assert_allclose(moved, [1.0, 1.0, 1.0])


def test_motion_of_a_robot_that_never_moves_is_zero() -> None:
    still = np.ones((4, 2), dtype=np.float32)
    assert not motion(np.zeros(4, int), np.arange(4), still, 1).any()
    assert not motion(np.arange(4), np.zeros(4, int), still, 1).any()


def test_motion_does_not_depend_on_the_order_of_frames() -> None:
    rng = np.random.default_rng(0)
    episodes, frames = np.repeat([3, 7], 10), np.tile(np.arange(10), 2)
    states = rng.normal(size=(20, 4)).astype(np.float32)
    order = rng.permutation(20)
    shuffled = motion(episodes[order], frames[order], states[order], 2)
    np.testing.assert_array_equal(shuffled, motion(episodes, frames, states, 2)[order])


def test_strided_keeps_every_nth_frame_of_each_episode() -> None:
    kept = strided(candidates({(0, 0): 7, (0, 1): 4}), 3)
    assert [(c.episode, c.frame) for c in kept] == [(0, 0), (0, 3), (0, 6), (1, 0), (1, 3)]


def test_balance_over_tasks_and_episodes_of_unequal_length() -> None:
    pool = candidates({(0, 0): 200, (0, 1): 20, (1, 2): 30, (1, 3): 30, (2, 4): 500})
    chosen = [pool[i] for i in balanced(pool, 90, seed=1)]
    assert Counter(c.task for c in chosen) == {0: 30, 1: 30, 2: 30}
    assert Counter(c.episode for c in chosen) == {0: 15, 1: 15, 2: 15, 3: 15, 4: 30}


def test_short_tasks_give_all_they_have_and_others_take_the_rest() -> None:
    pool = candidates({(0, 0): 4, (1, 1): 100, (2, 2): 100})
    chosen = [pool[i] for i in balanced(pool, 50, seed=0)]
    assert Counter(c.task for c in chosen) == {0: 4, 1: 23, 2: 23}


def test_choice_within_an_episode_is_spread_over_time() -> None:
    pool = candidates({(0, 0): 100})
    frames = [pool[i].frame for i in balanced(pool, 10, seed=5)]
    assert [frame // 10 for frame in frames] == list(range(10))


def test_more_than_there_is_returns_everything_once() -> None:
    pool = candidates({(0, 0): 3, (1, 1): 5})
    assert sorted(balanced(pool, 99, seed=0)) == list(range(8))
    assert balanced([], 5, seed=0) == []


def test_same_seed_same_frames_whatever_the_order_of_the_input() -> None:
    pool = candidates({(t, 10 * t + e): 40 for t in range(3) for e in range(5)})
    first = balanced(pool, 31, seed=3)
    assert first == balanced(pool[::-1], 31, seed=3)
    assert first != balanced(pool, 31, seed=4)


@pytest.mark.parametrize("count", [0, 1, 5, 9, 17, 18, 40])
def test_shares_add_up_and_differ_by_one_at_most_unless_capped(count: int) -> None:
    sizes = {"a": 2, "b": 6, "c": 10}
    quota = shares(count, sizes, seed=0)
    assert sum(quota.values()) == min(count, 18)
    open_quota = [quota[key] for key in sizes if quota[key] < sizes[key]]
    assert not open_quota or max(quota.values()) - min(open_quota) <= 1
