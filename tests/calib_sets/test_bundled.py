"""The set that comes with a clone: small, balanced, and held out from episodes nobody trained on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from quantvla.calib_sets import CalibrationSet, open_set
from quantvla.calib_sets.bundled import bundled_set
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.manifest import VectorSpec

PATH = Path(__file__).parents[2] / "calib_sets" / "metaworld"
EPISODES_PER_TASK, HELD_OUT = 24, 4


@pytest.fixture(scope="module")
def bundled() -> CalibrationSet:
    """Return the bundled set, every checksum verified."""
    return open_set(PATH)


def test_at_most_six_megabytes(bundled: CalibrationSet) -> None:
    assert sum(p.stat().st_size for p in PATH.rglob("*") if p.is_file()) <= 6_000_000
    named = {i.file for entry in bundled.entries for i in entry.images.values()}
    assert {f"images/{p.name}" for p in (PATH / "images").iterdir()} == named


def test_balanced_over_tasks_and_moving(bundled: CalibrationSet) -> None:
    for part, frames in (("calibration", 256), ("heldout", 64)):
        entries = bundled.part(part).entries  # type: ignore[arg-type]
        counts = Counter(entry.task for entry in entries)
        assert len(entries) == frames
        assert max(counts.values()) - min(counts.values()) <= 1
        assert all(entry.motion >= bundled.card.motion.min_motion for entry in entries)
    assert len(bundled.card.tasks) == 9


def test_held_out_episodes_were_kept_out_of_training(bundled: CalibrationSet) -> None:
    def last_of_its_task(episode: int) -> bool:
        return episode % EPISODES_PER_TASK >= EPISODES_PER_TASK - HELD_OUT

    assert all(last_of_its_task(e) for e in bundled.card.episodes["heldout"])
    assert not any(last_of_its_task(e) for e in bundled.card.episodes["calibration"])


def test_every_picture_decodes(bundled: CalibrationSet) -> None:
    for frame in bundled:
        for camera in bundled.robot.cameras:
            assert frame.observation[camera.key].std() > 10  # not an empty view


def test_it_is_found_by_robot(bundled: CalibrationSet) -> None:
    robot = bundled.robot
    assert bundled_set(robot.cameras, robot.state).checksum == bundled.checksum
    with pytest.raises(QuantVLAError, match=r"none of the bundled ones .*pass --calib SET"):
        bundled_set(robot.cameras, VectorSpec(key="observation.state", dim=7))
