"""Parts never show the same moment."""

from __future__ import annotations

import pytest

from quantvla.calib_sets.split import split_frames
from quantvla.runtime.errors import QuantVLAError


def test_last_fifth_of_every_task_is_held_out() -> None:
    episodes = [e for e in range(20) for _ in range(3)]
    tasks = ["a" if e < 10 else "b" for e in episodes]
    parts, split = split_frames("s", episodes, [0, 1, 2] * 20, tasks)
    held = {e for e, part in zip(episodes, parts, strict=True) if part == "heldout"}
    assert held == {8, 9, 18, 19}
    assert split.method == "episodes"
    assert "4 of 20" in split.detail


def test_tasks_with_one_episode_calibrate_when_another_task_can_be_held_out() -> None:
    parts, _ = split_frames("s", [0, 1, 2], [0, 0, 0], ["a", "b", "b"])
    assert parts == ["calibration", "calibration", "heldout"]


def test_one_episode_of_each_task_still_leaves_one_held_out() -> None:
    parts, _ = split_frames("s", [0, 1, 2], [0, 0, 0], ["a", "b", "c"])
    assert parts == ["calibration", "calibration", "heldout"]


def test_one_episode_is_cut_in_time_with_a_gap() -> None:
    frames = list(range(100))
    parts, split = split_frames("s", [7] * 100, frames[::-1], ["a"] * 100)
    by_time = parts[::-1]
    assert by_time == ["calibration"] * 70 + [None] * 10 + ["heldout"] * 20
    assert split.method == "time"
    assert "gap of 10" in split.detail


def test_one_episode_of_three_frames_cannot_be_cut() -> None:
    with pytest.raises(QuantVLAError, match=r"at least 4 frames .*got 3; record more frames"):
        split_frames("s", [0] * 3, [0, 1, 2], ["a"] * 3)


def test_the_source_and_the_caller_may_name_held_out_episodes() -> None:
    episodes, tasks = [0, 1, 2, 3], ["a"] * 4
    by_source, split = split_frames("s", episodes, [0] * 4, tasks, source={1, 99})
    assert by_source == ["calibration", "heldout", "calibration", "calibration"]
    assert split.method == "source"
    by_caller, split = split_frames("s", episodes, [0] * 4, tasks, given={0}, source={1})
    assert by_caller == ["heldout", "calibration", "calibration", "calibration"]
    assert split.method == "given"


@pytest.mark.parametrize("given", [{9}, set(), {0, 1}])
def test_unknown_no_or_all_episodes_held_out(given: set[int]) -> None:
    with pytest.raises(QuantVLAError, match="some, not all, of the source's episodes"):
        split_frames("s", [0, 1], [0, 0], ["a", "a"], given=given)
