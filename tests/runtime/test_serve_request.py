"""Their observation keys and our own; images as arrays and as JPEG."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from tiny_engine import CAMERAS, make_manifest

from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.serve.request import RequestReader, decode_jpeg

FRONT, WRIST = CAMERAS
IMAGE = np.full((8, 12, 3), 7, np.uint8)
STATE = np.zeros(3)


def read(message: dict[str, object], **renames: str) -> dict[str, object]:
    return RequestReader(make_manifest(), renames).read(message).observation


def jpeg(image: np.ndarray, kind: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("task", "task"),
        ("prompt", "task"),
        ("observation.state", "observation.state"),
        ("observation/state", "observation.state"),
        ("state", "observation.state"),
        ("observation/images/front", FRONT),
        ("images/front", FRONT),
        ("images.front", FRONT),
        ("timestamp", "timestamp"),
    ],
)
def test_names_of_openpi_robots(theirs: str, ours: str) -> None:
    assert read({theirs: 1}) == {ours: 1}


def test_cameras_in_a_map_of_their_own() -> None:
    assert read({"images": {"front": 1, "wrist": 2}}) == {FRONT: 1, WRIST: 2}


def test_renames_decide_what_names_do_not() -> None:
    renames = {"observation/image": FRONT, "observation/wrist_image": WRIST}
    assert read({"observation/image": 1, "observation/wrist_image": 2}, **renames) == {
        FRONT: 1,
        WRIST: 2,
    }


def test_rename_to_nothing_is_refused() -> None:
    with pytest.raises(
        QuantVLAError, match=r"does not read 'observation.images.frnt'; did you mean"
    ):
        read({}, cam="observation.images.frnt")


def test_one_key_given_twice_is_refused() -> None:
    with pytest.raises(QuantVLAError, match="'task': is given twice, got 'prompt'"):
        read({"task": "pick", "prompt": "place"})


def test_noise_and_seed_are_no_observation() -> None:
    noise = np.zeros((1, 4, 6), np.float32)
    request = RequestReader(make_manifest(), {}).read({"task": "x", "noise": noise, "seed": 3})
    assert request.observation == {"task": "x"} and request.seed == 3 and request.noise is noise


@pytest.mark.parametrize("seed", [-1, True, 1.5, "3"])
def test_bad_seed(seed: object) -> None:
    with pytest.raises(QuantVLAError, match="seed: expected a whole number"):
        RequestReader(make_manifest(), {}).read({"seed": seed})


def test_bad_noise() -> None:
    with pytest.raises(QuantVLAError, match="noise: expected an array, got str"):
        RequestReader(make_manifest(), {}).read({"noise": "x"})


def test_a_prefix_is_read_with_its_defaults() -> None:
    actions = np.ones((3, 2))
    request = RequestReader(make_manifest(), {}).read({"prefix": {"actions": actions, "frozen": 1}})
    assert request.observation == {} and request.prefix is not None
    assert request.prefix.frozen == 1 and request.prefix.method == "prefix"
    np.testing.assert_array_equal(request.prefix.actions, actions.astype(np.float32), strict=True)


@pytest.mark.parametrize(
    ("prefix", "match"),
    [
        (3, "expected a map with floats 'actions'.*got int"),
        ({"frozen": 1}, "expected a map with floats 'actions'.*got frozen"),
        ({"actions": np.ones((3, 2), np.int64), "frozen": 1}, "expected a map with floats"),
        ({"actions": np.ones((3, 2))}, "missing required field `frozen`"),
        ({"actions": np.ones((3, 2)), "frozen": -1}, "frozen"),
        (
            {"actions": np.ones((3, 2)), "frozen": 1, "method": "magic"},
            "Invalid enum value 'magic'",
        ),
        ({"actions": np.ones((3, 2)), "frozen": 1, "speed": 2}, "unknown field `speed`"),
    ],
)
def test_bad_prefix(prefix: object, match: str) -> None:
    with pytest.raises(QuantVLAError, match=f"prefix: .*{match}"):
        RequestReader(make_manifest(), {}).read({"prefix": prefix})


def test_jpeg_under_a_camera_is_decoded_and_elsewhere_left_alone() -> None:
    data = jpeg(IMAGE)
    observation = read({FRONT: data, "note": data})
    assert observation["note"] == data
    np.testing.assert_array_equal(observation[FRONT], IMAGE)  # one flat colour survives JPEG


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "do not decode"),
        (b"\xff\xd8\xff", "do not decode"),
        (jpeg(IMAGE)[:-40], "do not decode"),
        (jpeg(IMAGE, "PNG"), "do not decode"),
        (jpeg(np.zeros((1, 1, 3), np.uint8)).replace(b"\x00\x01\x00\x01\x03", b"\x17\x70\x17\x70\x03"), "6000x6000 pixels"),
    ],
)  # fmt: skip
def test_bad_jpeg_is_named(data: bytes, match: str) -> None:
    with pytest.raises(QuantVLAError, match=match):
        decode_jpeg(FRONT, data)
