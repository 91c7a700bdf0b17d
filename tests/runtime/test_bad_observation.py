"""Each mistake in an observation is named: key, expected, got, remedy."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from tiny_engine import CAMERAS, HEIGHT, WIDTH, make_manifest, observation

from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.manifest import VectorSpec
from quantvla.runtime.preprocess import Preprocessor
from quantvla.runtime.processing_steps import Images

FRONT = CAMERAS[0]
IMAGE = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
RGB = "expected an RGB image, numpy uint8 of shape \\(height, width, 3\\), got "


@pytest.fixture(scope="module")
def preprocessor(pristine_engine: Path) -> Preprocessor:
    manifest = make_manifest()
    return Preprocessor(
        manifest.preprocess,
        manifest.statistics,
        pristine_engine,
        cameras=manifest.cameras,
        state=manifest.state,
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (IMAGE.transpose(2, 0, 1), RGB + r"CHW uint8 \(3, 8, 12\); transpose it"),
        (IMAGE.astype(np.float32), RGB + r"float32 \(8, 12, 3\); pass the camera's uint8 pixels"),
        (IMAGE.astype(np.int64), RGB + "int64"),
        (IMAGE[:, :, 0], RGB + r"grayscale uint8 \(8, 12\); pass the colour image"),
        (IMAGE[:, :, :1], RGB + r"grayscale uint8 \(8, 12, 1\)"),
        (np.zeros((8, 12, 4), np.uint8), RGB + r"RGBA uint8 \(8, 12, 4\); drop the alpha channel"),
        (IMAGE[None], RGB + r"a batch uint8 \(1, 8, 12, 3\); pass one image"),
        (np.zeros((8, 12, 7), np.uint8), RGB + r"uint8 \(8, 12, 7\)"),
        (np.zeros(8, np.uint8), RGB + r"uint8 \(8,\)"),
        (np.zeros((0, 12, 3), np.uint8), RGB + "an empty image"),
        (IMAGE.tolist(), RGB + r"builtins.list; convert it with np.asarray"),
        (np.zeros((1, 200, 3), np.uint8), r"too thin to fit into 8x12, got 1x200"),
    ],
)
def test_images(preprocessor: Preprocessor, value: object, message: str) -> None:
    with pytest.raises(QuantVLAError, match=rf"observation '{FRONT}': .*{message}"):
        preprocessor(observation() | {FRONT: value})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros(4), r"vector of 3 numbers, got shape \(4,\); .* order shoulder, elbow, wrist"),
        (np.zeros((1, 3)), r"expected a vector of 3 numbers, got shape \(1, 3\)"),
        (
            [0.0, float("nan"), 0.0],
            "must be finite, got NaN or infinity at elbow; check the sensor",
        ),
        ([float("inf"), 0.0, float("nan")], "NaN or infinity at shoulder, wrist"),
        (["a", "b", "c"], "expected a vector of 3 numbers, got dtype <U1; pass float32"),
        (np.zeros(3, bool), "got dtype bool"),
        (None, "got dtype object"),
    ],
)
def test_state(preprocessor: Preprocessor, value: object, message: str) -> None:
    with pytest.raises(QuantVLAError, match=f"observation 'observation.state': .*{message}"):
        preprocessor(observation() | {"observation.state": value})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "the instruction is empty, got ''; say what the robot is to do"),
        (" \n", "the instruction is empty"),
        (["pick"], "expected the instruction as str, got list; pass one sentence"),
        (None, "expected the instruction as str, got NoneType"),
    ],
)
def test_task(preprocessor: Preprocessor, value: object, message: str) -> None:
    with pytest.raises(QuantVLAError, match=f"observation 'task': {message}"):
        preprocessor(observation() | {"task": value})


@pytest.mark.parametrize(
    ("key", "kind"),
    [(FRONT, "camera image"), ("observation.state", "vector"), ("task", "instruction")],
)
def test_missing_key(preprocessor: Preprocessor, key: str, kind: str) -> None:
    obs = observation()
    del obs[key]
    with pytest.raises(QuantVLAError, match=f"observation '{key}': {kind} is missing; add it"):
        preprocessor(obs)


def test_empty_observation(preprocessor: Preprocessor) -> None:
    with pytest.raises(QuantVLAError, match=r"camera image is missing; .*observation is empty"):
        preprocessor({})


def test_missing_key_offers_the_nearest(preprocessor: Preprocessor) -> None:
    obs = observation()
    obs["observation.sate"] = obs.pop("observation.state")
    with pytest.raises(QuantVLAError, match=r"did you mean 'observation.sate'"):
        preprocessor(obs)


@pytest.mark.parametrize(
    ("key", "value"), [("observation.images.frnt", None), ("front_camera", IMAGE)]
)
def test_unexpected_camera(preprocessor: Preprocessor, key: str, value: object) -> None:
    with pytest.raises(QuantVLAError, match=f"observation '{key}': unexpected camera"):
        preprocessor(observation() | {key: value})


def test_unexpected_camera_offers_the_nearest(preprocessor: Preprocessor) -> None:
    with pytest.raises(QuantVLAError, match=f"did you mean '{FRONT}'"):
        preprocessor(observation() | {"observation.images.frnt": IMAGE})


def _without_resize(directory: Path, *, cameras: bool) -> Preprocessor:
    manifest = make_manifest()
    images = manifest.preprocess[0]
    assert isinstance(images, Images)
    step = msgspec.structs.replace(images, resize=None)
    return Preprocessor([step], {}, directory, cameras=manifest.cameras if cameras else ())


def test_other_size_without_a_resize_step(pristine_engine: Path) -> None:
    preprocessor = _without_resize(pristine_engine, cameras=True)
    with pytest.raises(QuantVLAError, match=r"image of 8x12 \(height x width\), .* got 16x12"):
        preprocessor({FRONT: np.zeros((16, 12, 3), np.uint8), CAMERAS[1]: IMAGE})


def test_cameras_of_two_sizes_without_a_resize_step(pristine_engine: Path) -> None:
    preprocessor = _without_resize(pristine_engine, cameras=False)
    with pytest.raises(QuantVLAError, match="cameras must have one size"):
        preprocessor({FRONT: np.zeros((16, 12, 3), np.uint8), CAMERAS[1]: IMAGE})


def test_vector_longer_than_the_model_input(pristine_engine: Path) -> None:
    normalize = msgspec.structs.replace(make_manifest().preprocess[1], mode="identity")
    with pytest.raises(QuantVLAError, match="expected at most 5 numbers, got 9"):
        Preprocessor([normalize], {}, pristine_engine)({"observation.state": np.zeros(9)})
    with pytest.raises(QuantVLAError, match=r"vector of 9 does not fit a model input of 5"):
        Preprocessor(
            [normalize], {}, pristine_engine, state=VectorSpec(key="observation.state", dim=9)
        )
