"""The whole pipeline equals lerobot's: saved processor steps plus what SmolVLA does inside."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors
from tiny_engine import CAMERAS, HEIGHT, WIDTH, make_manifest, observation, write_tokenizer
from transformers import PreTrainedTokenizerFast

from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.manifest import VectorSpec
from quantvla.runtime.postprocess import Postprocessor
from quantvla.runtime.preprocess import Preprocessor
from quantvla.runtime.processing_steps import (
    FeatureStatistics,
    Images,
    Normalize,
    Tokenize,
    Unnormalize,
)

STATISTICS = {
    "observation.state": FeatureStatistics(mean=(0.5, -1.0, 2.0), std=(1.0, 2.0, 0.5)),
    "action": FeatureStatistics(mean=(10.0, -3.0), std=(2.0, 0.1)),
}
STEPS = (
    Images(keys=CAMERAS, output="images", resize=(96, 128), pad_value=0.0, scale=2.0, offset=-1.0),
    Normalize(key="observation.state", output="state", mode="mean_std", eps=1e-8, pad_to=32),
    Tokenize(
        key="task",
        file="tokenizer.json",
        suffix="\n",
        max_length=12,
        pad_id=0,
        tokens="tokens",
        mask="mask",
    ),
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path / "tokenizer.json")
    PreTrainedTokenizerFast(
        tokenizer_file=str(path / "tokenizer.json"), pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def config(directory: Path) -> SmolVLAConfig:
    return SmolVLAConfig(
        input_features={
            "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(3,)),
            **{k: PolicyFeature(type=FeatureType.VISUAL, shape=(3, 90, 120)) for k in CAMERAS},
        },
        output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(2,))},
        resize_imgs_with_padding=(128, 96),
        vlm_model_name=str(directory),
        tokenizer_max_length=12,
        pad_language_to="max_length",
        device="cpu",
    )


def _lerobot_processors(config: SmolVLAConfig):  # type: ignore[no-untyped-def]
    statistics = {
        key: {name: values for name, values in msgspec.to_builtins(s).items() if values}
        for key, s in STATISTICS.items()
    }
    return make_smolvla_pre_post_processors(config, statistics)


@pytest.mark.parametrize("size", [(90, 120), (96, 128), (131, 77), (240, 320)])
@pytest.mark.parametrize("task", ["pick up the cup", "cup\n"])
def test_inputs_equal_lerobot(
    config: SmolVLAConfig, directory: Path, size: tuple[int, int], task: str
) -> None:
    rng = np.random.default_rng(0)
    images = {key: rng.integers(0, 256, (*size, 3), dtype=np.uint8) for key in CAMERAS}
    state = rng.standard_normal(3).astype(np.float32)

    preprocess, _ = _lerobot_processors(config)
    batch = preprocess(
        {
            **{k: torch.from_numpy(v).permute(2, 0, 1) / 255 for k, v in images.items()},
            "observation.state": torch.from_numpy(state),
            "task": task,
        }
    )
    inside = SimpleNamespace(config=config)
    expected_images, _ = SmolVLAPolicy.prepare_images(inside, batch)
    expected_state = SmolVLAPolicy.prepare_state(inside, batch)

    found = Preprocessor(STEPS, STATISTICS, directory)(
        {**images, "observation.state": state, "task": task}
    )
    np.testing.assert_allclose(found["images"], torch.cat(expected_images).numpy(), atol=1e-5)
    np.testing.assert_allclose(found["state"], expected_state.numpy(), atol=1e-6)
    np.testing.assert_array_equal(found["tokens"], batch["observation.language.tokens"].numpy())
    np.testing.assert_array_equal(
        found["mask"], batch["observation.language.attention_mask"].numpy()
    )
    assert {name: tensor.dtype.name for name, tensor in found.items()} == {
        "images": "float32",
        "state": "float32",
        "tokens": "int64",
        "mask": "bool",
    }


def test_actions_equal_lerobot(config: SmolVLAConfig) -> None:
    output = np.random.default_rng(0).standard_normal((1, 5, 32)).astype(np.float32)
    _, postprocess = _lerobot_processors(config)
    expected = postprocess(torch.from_numpy(output[:, :, :2]))[0].numpy()
    step = Unnormalize(key="action", mode="mean_std", eps=1e-8, dim=2)
    found = Postprocessor([step], STATISTICS)(output)
    assert found.shape == (5, 2) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_keys_and_ignored_entries(directory: Path) -> None:
    preprocessor = Preprocessor(STEPS, STATISTICS, directory)
    assert preprocessor.keys == {*CAMERAS, "observation.state", "task"}
    preprocessor({**observation(), "timestamp": 0.5, "action": np.zeros(2)})


def test_without_resize_the_pixels_are_scaled(directory: Path) -> None:
    steps = [msgspec.structs.replace(STEPS[0], resize=None)]
    obs = observation()
    images = Preprocessor(steps, {}, directory)(
        {key: value for key, value in obs.items() if key in CAMERAS}
    )["images"]
    first = np.asarray(obs[CAMERAS[0]]).transpose(2, 0, 1)
    np.testing.assert_allclose(images[0], first / 255 * 2 - 1, atol=1e-6)


@pytest.mark.parametrize(
    ("factor", "message"), [(2, "it is resized"), (1, "the aspect ratio differs")]
)
def test_other_size_warns_once(
    directory: Path, caplog: pytest.LogCaptureFixture, factor: int, message: str
) -> None:
    preprocessor = Preprocessor(STEPS, STATISTICS, directory, cameras=make_manifest().cameras)
    height, width = HEIGHT * factor, WIDTH * 2
    obs = observation() | {CAMERAS[0]: np.zeros((height, width, 3), np.uint8)}
    with caplog.at_level(logging.WARNING):
        preprocessor(obs)
        preprocessor(obs)
    (record,) = caplog.records
    assert f"{CAMERAS[0]!r}: the policy's camera is 8x12" in record.getMessage()
    assert message in record.getMessage()


def test_tokenizer_counter(directory: Path) -> None:
    preprocessor = Preprocessor(STEPS, STATISTICS, directory)
    preprocessor(observation() | {"task": "cup " * 50})
    assert preprocessor.truncated == 1


def test_unknown_step(directory: Path) -> None:
    with pytest.raises(QuantVLAError, match="preprocessing: unknown step, got Unnormalize"):
        Preprocessor(make_manifest().postprocess, {}, directory)  # type: ignore[arg-type]


def test_state_statistics_must_fit(directory: Path) -> None:
    with pytest.raises(QuantVLAError, match="vector of 4 does not fit statistics of 3"):
        Preprocessor(STEPS, STATISTICS, directory, state=VectorSpec(key="observation.state", dim=4))


def test_postprocessing_needs_one_step() -> None:
    with pytest.raises(
        QuantVLAError, match="expected one unnormalize step, then only add_state steps, got \\[\\]"
    ):
        Postprocessor([], {})


def test_action_statistics_must_fit() -> None:
    step = Unnormalize(key="action", mode="mean_std", eps=1e-8, dim=3)
    with pytest.raises(QuantVLAError, match="statistics of 'action': expected 3 entries, got 2"):
        Postprocessor([step], STATISTICS)
