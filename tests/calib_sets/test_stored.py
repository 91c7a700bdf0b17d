"""Our own format: what is written comes back, and what was damaged is named."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from hashlib import sha256
from pathlib import Path

import msgspec
import numpy as np
import pytest
from invented_robot import HEIGHT, TOP, WIDTH, WRIST, Episodes
from PIL import Image

from quantvla.calib_sets import (
    CalibrationSet,
    Selection,
    build_set,
    limit,
    open_set,
    record,
    select,
)
from quantvla.calib_sets.card import Card, make_card
from quantvla.calib_sets.card_file import encode_card
from quantvla.calib_sets.images import encode_image
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.files import sha256_tree


def rewrite(directory: Path, card: Card, **changes: object) -> None:
    """Write a card with other fields and a fitting checksum: only the tested check can refuse it."""
    fields = {name: getattr(card, name) for name in card.__struct_fields__}
    fields.update(changes)
    for name in ("schema_version", "episodes", "checksum"):
        fields.pop(name)
    (directory / "card.json").write_bytes(
        encode_card(make_card(fields.pop("name"), where="test", **fields))
    )


def replace_image(directory: Path, card: Card, data: bytes) -> Path:
    """Put ``data`` in place of the first picture of the top camera, checksum included."""
    entry = card.frames[0]
    image = entry.images[TOP]
    (directory / image.file).write_bytes(data)
    new = msgspec.structs.replace(image, sha256=sha256(data).hexdigest())
    first = msgspec.structs.replace(entry, images={**entry.images, TOP: new})
    rewrite(directory, card, frames=(first, *card.frames[1:]))
    return directory / image.file


def test_round_trip_png_is_exact(tmp_path: Path, episodes: Episodes) -> None:
    given = list(episodes())
    written = record(iter(given), tmp_path / "set", image_format="png")
    assert len(written) == 60
    for frame, (observation, episode, number) in zip(written, given, strict=True):
        assert (frame.episode, frame.frame, frame.task) == (episode, number, observation["task"])
        assert frame.observation.keys() == observation.keys()
        for key in (TOP, WRIST, "observation.state"):
            np.testing.assert_array_equal(frame.observation[key], observation[key])
            assert frame.observation[key].dtype == observation[key].dtype


def test_round_trip_jpeg_is_close_and_keeps_chroma(
    stored: CalibrationSet, episodes: Episodes, tmp_path: Path
) -> None:
    for frame, (observation, _, _) in zip(stored, episodes(), strict=True):
        error = frame.observation[TOP].astype(int) - observation[TOP].astype(int)
        assert np.abs(error).mean() < 2.5
    with Image.open(tmp_path / "set" / stored.card.frames[0].images[TOP].file) as picture:
        assert picture.format == "JPEG"
        assert [layer[1:3] for layer in picture.layer] == [(1, 1)] * 3


def test_same_recording_same_bytes(tmp_path: Path, episodes: Episodes) -> None:
    for name in ("a", "b"):
        record(episodes(), tmp_path / name, name="same")
    assert sha256_tree(tmp_path / "a") == sha256_tree(tmp_path / "b")


def test_build_is_deterministic_and_balanced(stored: CalibrationSet, tmp_path: Path) -> None:
    selection = Selection(frames=16, heldout_frames=6, stride=1, seed=3)
    built = [build_set(stored, tmp_path / n, selection=selection, name="x") for n in ("a", "b")]
    assert sha256_tree(tmp_path / "a") == sha256_tree(tmp_path / "b")
    assert built[0].checksum == built[1].checksum == built[0].card.checksum
    part = built[0].part("calibration")
    assert Counter(frame.task for frame in part) == {"task 0": 8, "task 1": 8}
    assert Counter(frame.episode for frame in part) == {0: 4, 1: 4, 2: 4, 3: 4}
    assert len(built[0].part("heldout")) == 6
    other = build_set(stored, tmp_path / "c", selection=Selection(frames=16, seed=4), name="x")
    assert other.checksum != built[0].checksum


def test_idle_frames_are_dropped(tmp_path: Path, episodes: Episodes) -> None:
    idle = record(episodes(frames=30, moving=9), tmp_path / "set")
    kept = select(idle, Selection(stride=1))
    assert {frame.frame for frame in kept} == set(range(9))
    everything = select(idle, Selection(stride=1, min_motion=0.0))
    assert len(everything) == len(idle)


def test_a_robot_that_never_moves_gives_no_set(tmp_path: Path, episodes: Episodes) -> None:
    still = record(episodes(moving=0), tmp_path / "set")
    with pytest.raises(QuantVLAError, match=r"after dropping idle frames: .*at least 4 .*got 0"):
        select(still, Selection())


def test_parts_do_not_overlap_and_make_up_the_set(stored: CalibrationSet) -> None:
    calibration, heldout = stored.part("calibration"), stored.part("heldout")
    assert not {f.episode for f in calibration} & {f.episode for f in heldout}
    assert len(calibration) + len(heldout) == len(stored)
    assert stored.checksum == stored.card.checksum
    assert len({stored.checksum, calibration.checksum, heldout.checksum}) == 3
    with pytest.raises(QuantVLAError, match="no such part, got 'test'; choose calibration or"):
        stored.part("test")  # type: ignore[arg-type]


def test_one_episode_keeps_a_gap_between_the_parts(tmp_path: Path, episodes: Episodes) -> None:
    one = record(episodes(count=1, frames=40), tmp_path / "set")
    assert [f.frame for f in one.part("calibration")] == list(range(28))
    assert [f.frame for f in one.part("heldout")] == list(range(32, 40))
    assert one.card.split.method == "time"
    assert len(list((tmp_path / "set" / "images").iterdir())) == 36 * 2


def test_limit_leaves_small_sets_alone_and_thins_large_ones(
    stored: CalibrationSet, tmp_path: Path
) -> None:
    assert limit(stored) is stored
    small = limit(stored, frames=8, heldout_frames=4)
    assert (len(small.part("calibration")), len(small.part("heldout"))) == (8, 4)
    assert small.checksum == limit(stored, frames=8, heldout_frames=4).checksum
    built = build_set(small, tmp_path / "small", selection=Selection(frames=8, heldout_frames=4))
    assert [(f.episode, f.frame) for f in built] == [(f.episode, f.frame) for f in small]


def test_a_moved_set_opens_and_keeps_its_checksum(stored: CalibrationSet, tmp_path: Path) -> None:
    (tmp_path / "set").rename(tmp_path / "elsewhere")
    assert open_set(tmp_path / "elsewhere").checksum == stored.checksum


@pytest.mark.parametrize("damage", ["truncate", "change", "remove"])
def test_damaged_images_are_named_when_the_set_is_opened(
    stored: CalibrationSet, tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "set" / stored.card.frames[5].images[WRIST].file
    data = path.read_bytes()
    path.write_bytes(data[:-9] if damage == "truncate" else data[:-1] + b"x")
    if damage == "remove":
        path.unlink()
    expected = "listed in the card but missing" if damage == "remove" else "checksum mismatch"
    with pytest.raises(QuantVLAError, match=f"00005-observation.images.wrist.jpg: {expected}"):
        open_set(tmp_path / "set")


def test_not_an_image(stored: CalibrationSet, tmp_path: Path) -> None:
    path = replace_image(tmp_path / "set", stored.card, b"no image at all")
    with pytest.raises(QuantVLAError, match=f"{path} {TOP}: is not a JPEG or PNG image"):
        open_set(tmp_path / "set")[0]


def test_truncated_jpeg_with_a_fitting_checksum(stored: CalibrationSet, tmp_path: Path) -> None:
    big = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    path = replace_image(tmp_path / "set", stored.card, encode_image(big, "jpeg")[:-300])
    with pytest.raises(QuantVLAError, match=f"{path} {TOP}: the image is truncated"):
        open_set(tmp_path / "set")[0]


def test_picture_of_another_size_or_mode(stored: CalibrationSet, tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("L", (WIDTH, HEIGHT)).save(stream, "PNG")
    replace_image(tmp_path / "set", stored.card, stream.getvalue())
    with pytest.raises(QuantVLAError, match=f"{TOP}: must be 16x24 RGB, got 16x24 L"):
        open_set(tmp_path / "set")[0]


def test_overlapping_parts_are_refused(stored: CalibrationSet) -> None:
    first = msgspec.structs.replace(stored.card.frames[0], part="heldout")
    with pytest.raises(QuantVLAError, match=r"share episodes, .*got \[0\]"):
        rewrite(Path(os.devnull), stored.card, frames=(first, *stored.card.frames[1:]))


def test_images_outside_the_set_are_refused(stored: CalibrationSet) -> None:
    entry = stored.card.frames[0]
    outside = msgspec.structs.replace(entry.images[TOP], file="images/../../secret.jpg")
    first = msgspec.structs.replace(entry, images={**entry.images, TOP: outside})
    with pytest.raises(QuantVLAError, match=r"must lie in images/ of the set, got images/../.."):
        rewrite(Path(os.devnull), stored.card, frames=(first, *stored.card.frames[1:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "is not a valid card .*unknown field `extra`"),
        ({"schema_version": 2}, "schema version must be 1, got 2; upgrade quantvla"),
        ({"schema_version": 0}, "schema version must be 1, got 0; build the set again"),
        ({"schema_version": "x"}, "is not the card of a calibration set"),
        ({"tasks": ["task 0", "other"]}, "checksum mismatch: the card was changed"),
        ({"tasks": ["task 0"]}, "frame 10: unknown task number, got 1"),
        ({"episodes": {"calibration": [0], "heldout": [1]}}, "episodes does not fit the frames"),
        ({"frames": []}, "at least 4 frames .*got 0; record more frames"),
    ],
)
def test_changed_cards(
    stored: CalibrationSet, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "set" / "card.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **change}))
    with pytest.raises(QuantVLAError, match=message):
        open_set(tmp_path / "set")


def test_a_card_cut_short(stored: CalibrationSet, tmp_path: Path) -> None:
    path = tmp_path / "set" / "card.json"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(QuantVLAError, match=r"card.json: is not the card of a calibration set"):
        open_set(tmp_path / "set")


def test_paths_that_are_no_set(tmp_path: Path, stored: CalibrationSet) -> None:
    with pytest.raises(QuantVLAError, match="nowhere: does not exist; give a calibration set"):
        open_set(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(QuantVLAError, match="file: is not a directory"):
        open_set(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(QuantVLAError, match="holds no calibration frames, got an empty directory"):
        open_set(tmp_path / "empty")
    with pytest.raises(QuantVLAError, match="already has a held-out part"):
        open_set(tmp_path / "set", heldout=[1])
