"""A plain directory of NPZ files: what a robot can record with numpy alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from invented_robot import TOP, WRIST, Episodes

from quantvla.calib_sets import CalibrationSet, Selection, build_set, open_set
from quantvla.runtime.errors import QuantVLAError

STATE = "observation.state"


def change(path: Path, **entries: Any) -> None:
    """Replace entries of an NPZ file; None removes one."""
    with np.load(path) as archive:
        content = {key: archive[key] for key in archive.files}
    content.update(entries)
    np.savez(path, **{key: value for key, value in content.items() if value is not None})


def test_frames_come_back_as_recorded(npz_directory: Path, episodes: Episodes) -> None:
    opened = open_set(npz_directory)
    assert opened.card.source.kind == "npz"
    assert opened.card.source.name == "npz"
    for frame, (observation, episode, number) in zip(opened, episodes(), strict=True):
        assert (frame.episode, frame.frame, frame.task) == (episode, number, observation["task"])
        assert list(frame.observation) == [TOP, WRIST, STATE, "task"]
        for key in (TOP, WRIST, STATE):
            np.testing.assert_array_equal(frame.observation[key], observation[key])


def test_same_parts_and_frames_as_a_recorded_set(
    npz_directory: Path, stored: CalibrationSet
) -> None:
    opened = open_set(npz_directory)
    assert opened.card.episodes == stored.card.episodes
    assert opened.card.tasks == stored.card.tasks
    assert [e.motion for e in opened.entries] == [e.motion for e in stored.entries]


def test_build_from_npz(npz_directory: Path, tmp_path: Path) -> None:
    selection = Selection(frames=12, heldout_frames=4, stride=2)
    built = build_set(open_set(npz_directory), tmp_path / "set", selection=selection)
    assert (len(built.part("calibration")), len(built.part("heldout"))) == (12, 4)
    assert built.card.source == open_set(npz_directory).card.source
    assert all(frame.frame % 2 == 0 for frame in built)


def test_named_held_out_episodes(npz_directory: Path) -> None:
    assert open_set(npz_directory, heldout=[0, 3]).card.episodes["heldout"] == (0, 3)


def test_files_without_numbers_are_one_episode_in_the_order_of_their_names(
    npz_directory: Path,
) -> None:
    for path in npz_directory.iterdir():
        change(path, episode=None, frame=None)
    opened = open_set(npz_directory)
    assert opened.card.split.method == "time"
    assert [frame.frame for frame in opened.part("heldout")] == list(range(48, 60))


def test_action_is_described_and_other_arrays_are_listed(npz_directory: Path) -> None:
    for path in npz_directory.iterdir():
        change(path, **{"action": np.zeros(5), "observation.effort": np.zeros(3)})
    card = open_set(npz_directory).card
    assert card.robot.action is not None
    assert card.robot.action.dim == 5
    assert card.source.ignored == ("observation.effort",)


def test_a_changed_file_changes_the_checksum(npz_directory: Path) -> None:
    before = open_set(npz_directory).checksum
    assert before == open_set(npz_directory).checksum
    change(npz_directory / "0003.npz", **{TOP: np.zeros((16, 24, 3), np.uint8)})
    assert open_set(npz_directory).checksum != before


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({TOP: None}, "key 'observation.images.top' is missing, got observation.images.wrist"),
        ({STATE: None}, "key 'observation.state' is missing"),
        ({"task": None}, "key 'task' is missing"),
        ({"task": np.zeros(3)}, "task: must be the instruction as text"),
        ({STATE: np.zeros(4)}, "observation.state: must have 3 entries like 0000.npz, got 4"),
        ({STATE: np.array([0, 1, np.inf])}, "observation.state: entry 2 is not finite, got inf"),
        ({TOP: np.zeros((3, 16, 24), np.uint8)}, r"top: an image must be .*got \(3, 16, 24\)"),
        ({TOP: np.zeros((16, 24, 3))}, r"top: an image must be .*got \(16, 24, 3\) float64"),
        ({TOP: np.zeros((8, 24, 3), np.uint8)}, "top: must be 16x24 .*got 8x24"),
        ({"observation.images.new": np.zeros((4, 4, 3), np.uint8)}, "new' is not in 0000.npz"),
        ({"episode": None}, r"episode: is in some files and not in others \(0000.npz differs\)"),
        ({"episode": np.array(-1)}, "episode: must be a whole number from 0, got -1"),
        ({"frame": np.array(0.5)}, "frame: must be a whole number from 0, got 0.5"),
        ({"frame": np.array(6)}, "episode 0 frame 6 occurs more than once"),
        ({STATE: np.array([None] * 3)}, "not a readable NPZ file .*Object arrays"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(
    npz_directory: Path, entries: dict[str, Any], message: str
) -> None:
    change(npz_directory / "0007.npz", **entries)
    where = "npz" if "more than once" in message else "0007.npz"
    with pytest.raises(QuantVLAError, match=f"{where}[ :].*{message}"):
        open_set(npz_directory)


@pytest.mark.parametrize("content", [b"", b"not a zip", None])
def test_unreadable_files(npz_directory: Path, content: bytes | None) -> None:
    path = npz_directory / "0007.npz"
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    with pytest.raises(QuantVLAError, match=r"0007.npz: is not a readable NPZ file"):
        open_set(npz_directory)


def test_a_file_that_is_removed_or_damaged_after_opening(npz_directory: Path) -> None:
    opened = open_set(npz_directory)
    path = npz_directory / "0000.npz"
    data = bytearray(path.read_bytes())
    data[200:400] = bytes(200)
    path.write_bytes(bytes(data))
    with pytest.raises(QuantVLAError, match=r"0000.npz: is not a readable NPZ file"):
        opened[0]
    path.unlink()
    with pytest.raises(QuantVLAError, match=r"0000.npz: is not a readable NPZ file"):
        opened[0]
