"""``quantvla calib``: what the commands print, write and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from invented_robot import TOP

from quantvla.calib_sets import CalibrationSet, open_set
from quantvla.cli.calib import calib
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.files import sha256_tree


def run(*arguments: object) -> Result:
    """Run the command; errors of ours pass through, the main entry point prints them."""
    return CliRunner().invoke(calib, [str(a) for a in arguments], catch_exceptions=False)


def test_info_json_is_one_object(stored: CalibrationSet, tmp_path: Path) -> None:
    shown = json.loads(run("info", tmp_path / "set", "--json").stdout)
    assert shown["name"] == "set"
    assert shown["checksum"] == stored.checksum
    assert shown["frames"] == 60
    assert shown["parts"]["calibration"] == {
        "frames": 40,
        "episodes": 4,
        "moving": 1.0,
        "tasks": {"task 0": 20, "task 1": 20},
    }
    assert shown["parts"]["heldout"]["episodes"] == 2
    assert shown["robot"]["cameras"][0] == {"key": TOP, "height": 16, "width": 24}
    assert shown["robot"]["state"]["dim"] == 3
    assert shown["size_bytes"] == sum(
        p.stat().st_size for p in (tmp_path / "set").rglob("*") if p.is_file()
    )
    assert shown["notes"] == ["40 calibration frames; 128 or more give stable ranges"]


def test_info_table_names_everything(stored: CalibrationSet, tmp_path: Path) -> None:
    text = run("info", tmp_path / "set").stdout
    expected = ("task 0", "moving frames", f"camera {TOP}: 16x24", "state observation.state: 3")
    for part in (*expected, f"checksum {stored.checksum}", "last 20% of the episodes of each"):
        assert part in text


def test_info_of_a_source_says_how_it_would_be_split(npz_directory: Path) -> None:
    shown = json.loads(run("info", npz_directory, "--json").stdout)
    assert shown["source"]["kind"] == "npz"
    assert shown["split"]["method"] == "episodes"


def test_build_writes_the_same_bytes_twice(npz_directory: Path, tmp_path: Path) -> None:
    options = ("--frames", 12, "--heldout-frames", 4, "--stride", 2, "--seed", 7, "--name", "n")
    for name in ("a", "b"):
        run("build", npz_directory, "-o", tmp_path / name, *options)
    assert sha256_tree(tmp_path / "a") == sha256_tree(tmp_path / "b")
    card = open_set(tmp_path / "a").card
    assert card.selection is not None
    assert (card.selection.frames, card.selection.stride, card.selection.seed) == (12, 2, 7)
    assert len(card.frames) == 16


def test_build_png_and_held_out_episodes(npz_directory: Path, tmp_path: Path) -> None:
    run(
        "build",
        npz_directory,
        "-o",
        tmp_path / "a",
        "--format",
        "png",
        "--heldout-episodes",
        "0-1,3",
    )
    built = open_set(tmp_path / "a")
    assert built.card.episodes["heldout"] == (0, 1, 3)
    assert all(p.suffix == ".png" for p in (tmp_path / "a" / "images").iterdir())
    np.testing.assert_array_equal(
        built[0].observation[TOP], open_set(npz_directory)[0].observation[TOP]
    )


def test_build_says_when_there_are_fewer_frames_than_asked(
    npz_directory: Path, tmp_path: Path
) -> None:
    result = run("build", npz_directory, "-o", tmp_path / "a", "--frames", 500)
    assert (
        "calibration: 500 frames asked, the source has 16 moving ones at stride 3" in result.stderr
    )


def test_build_takes_the_frames_of_some_tasks_from_another_set(
    stored: CalibrationSet, tmp_path: Path
) -> None:
    options = ("--format", "png", "--stride", 1)
    run("build", tmp_path / "set", "-o", tmp_path / "one", "--task", "task 1", *options)
    one = open_set(tmp_path / "one")
    wanted = [frame for frame in stored if frame.task == "task 1"]
    assert one.card.tasks == ("task 1",) and len(one) == len(wanted) > 0
    for frame, source in zip(one, wanted, strict=True):
        assert (frame.episode, frame.frame, frame.part) == (
            source.episode, source.frame, source.part,
        )  # fmt: skip
        assert frame.observation["task"] == "task 1"
        np.testing.assert_array_equal(frame.observation[TOP], source.observation[TOP])
    with pytest.raises(QuantVLAError, match=r"no frames of this task, got 'task 3'; did you mean"):
        run("build", tmp_path / "set", "-o", tmp_path / "two", "--task", "task 3")
    assert not (tmp_path / "two").exists()


def test_build_refuses(npz_directory: Path, tmp_path: Path, stored: CalibrationSet) -> None:
    with pytest.raises(QuantVLAError, match="set: already exists; choose another output or pass"):
        run("build", npz_directory, "-o", tmp_path / "set")
    with pytest.raises(QuantVLAError, match="must be numbers and ranges, got 'x'; write 80-83,90"):
        run("build", npz_directory, "-o", tmp_path / "a", "--heldout-episodes", "x")
    with pytest.raises(QuantVLAError, match=r"some, not all, .*got \[99\]; choose from 0 to 5"):
        run("build", npz_directory, "-o", tmp_path / "a", "--heldout-episodes", "99")
    assert run("build", npz_directory, "-o", tmp_path / "a", "--frames", 1).exit_code == 2
    assert not (tmp_path / "a").exists()


def test_record_refuses_an_unknown_task(tmp_path: Path) -> None:
    with pytest.raises(
        QuantVLAError, match=r"unknown Meta-World task, got 'pusch-v3'; did you mean"
    ):
        run("record", "--env", "metaworld", "--tasks", "pusch-v3", "-o", tmp_path / "set")


@pytest.mark.slow
def test_record_from_the_simulator(tmp_path: Path) -> None:
    pytest.importorskip("metaworld")
    options = ("--tasks", "drawer-close-v3,push-v3", "--episodes", 2, "--stride", 10)
    for name in ("a", "b"):
        run("record", "--env", "metaworld", *options, "-o", tmp_path / name)
    recorded, again = open_set(tmp_path / "a"), open_set(tmp_path / "b")
    assert recorded.card.frames == again.card.frames
    assert recorded.card.source.kind == "metaworld"
    assert recorded.card.tasks == ("Push and close a drawer", "Push the puck to a goal")
    assert recorded.card.episodes == {"calibration": (0, 2), "heldout": (1, 3)}
    assert all(frame.frame % 10 == 0 for frame in recorded)
    assert recorded[0].observation["observation.images.corner2"].shape == (128, 128, 3)
