"""The plug-in's classes: features from the manifest, tensors back to pixels, batches, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.policy import Policy

CAMERA = "observation.images.corner2"


def observation(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        CAMERA: rng.integers(0, 256, (480, 480, 3), dtype=np.uint8),
        "observation.state": rng.standard_normal(4).astype(np.float32),
        "task": "push the red block",
    }


def batch_of(*observations: dict[str, Any]) -> dict[str, Any]:
    """What lerobot makes of raw observations: (batch, 3, height, width) in [0, 1]."""
    import torch

    pixels = torch.from_numpy(np.stack([obs[CAMERA] for obs in observations]))
    states = torch.from_numpy(np.stack([obs["observation.state"] for obs in observations]))
    return {
        CAMERA: pixels.permute(0, 3, 1, 2).contiguous().type(torch.float32) / 255,
        "observation.state": states,
        "task": [obs["task"] for obs in observations],
    }


@pytest.fixture(scope="module")
def config(one_camera_engine: Path) -> Any:
    from quantvla.lerobot_policy.configuration_quantvla import QuantVLAConfig

    return QuantVLAConfig(engine=str(one_camera_engine), threads=1)


@pytest.fixture
def lerobot_policy(config: Any) -> Any:
    from quantvla.lerobot_policy.modeling_quantvla import QuantVLAPolicy

    return QuantVLAPolicy.from_pretrained(config=config)


def test_features_are_the_engines(config: Any, one_camera_engine: Path) -> None:
    from quantvla.lerobot_policy.configuration_quantvla import QuantVLAConfig

    assert {key: tuple(f.shape) for key, f in config.input_features.items()} == {
        CAMERA: (3, 480, 480),
        "observation.state": (4,),
    }
    assert tuple(config.output_features["action"].shape) == (4,)
    renamed = QuantVLAConfig(
        engine=str(one_camera_engine), rename_map={"observation.image": CAMERA}
    )
    assert "observation.image" in renamed.input_features and CAMERA not in renamed.input_features


def test_every_pixel_value_survives_the_division_by_255() -> None:
    import torch

    from quantvla.lerobot_policy.modeling_quantvla import _pixels

    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = torch.from_numpy(np.stack([values] * 3)).type(torch.float32) / 255
    np.testing.assert_array_equal(_pixels("cam", image)[:, :, 0], values)
    with pytest.raises(QuantVLAError, match=r"expected pixels in \[0, 1\], got 0 to 255"):
        _pixels("cam", image * 255)


def test_select_action_is_the_runtimes(lerobot_policy: Any, one_camera_engine: Path) -> None:
    with Policy.from_pretrained(one_camera_engine, threads=1) as policy:
        for tick in range(6):
            got = lerobot_policy.select_action(batch_of(observation(tick)))
            np.testing.assert_array_equal(
                got.numpy(), policy.select_action(observation(tick))[None]
            )
        lerobot_policy.reset()
        policy.reset()
        got = lerobot_policy.select_action(batch_of(observation(9)))
        np.testing.assert_array_equal(got.numpy()[0], policy.select_action(observation(9)))


def test_a_batch_is_its_elements(lerobot_policy: Any, one_camera_engine: Path) -> None:
    import torch

    with Policy.from_pretrained(one_camera_engine, threads=1) as policy:
        noise = np.concatenate([policy.sample_noise(seed) for seed in (1, 2)])
        both = batch_of(observation(0), observation(1))
        chunk = lerobot_policy.predict_action_chunk(both, noise=torch.from_numpy(noise))
        for index in range(2):
            expected = policy.predict_action_chunk(observation(index), seed=index + 1)
            np.testing.assert_array_equal(chunk[index].numpy(), expected)


def test_a_device_that_has_no_effect_is_said(caplog: pytest.LogCaptureFixture) -> None:
    from quantvla.lerobot_policy.configuration_quantvla import QuantVLAConfig

    assert QuantVLAConfig().device == "cpu" and not caplog.records
    assert QuantVLAConfig(device="cuda").device == "cpu"
    assert "--policy.device=cuda has no effect" in caplog.text


def test_refusals(config: Any, lerobot_policy: Any, one_camera_engine: Path) -> None:
    from quantvla.lerobot_policy.configuration_quantvla import QuantVLAConfig
    from quantvla.lerobot_policy.modeling_quantvla import QuantVLAPolicy

    with pytest.raises(QuantVLAError, match=r"--policy\.engine: is missing"):
        QuantVLAPolicy(QuantVLAConfig())
    with pytest.raises(QuantVLAError, match="not an engine directory"):
        QuantVLAConfig(engine=str(one_camera_engine.parent / "none"))
    with pytest.raises(QuantVLAError, match=rf"does not read '{CAMERA}s'; did you mean '{CAMERA}'"):
        QuantVLAConfig(engine=str(one_camera_engine), rename_map={"image": CAMERA + "s"})
    for ask in (
        lambda: lerobot_policy.forward({}),
        lerobot_policy.get_optim_params,
        config.get_optimizer_preset,
        config.get_scheduler_preset,
    ):
        with pytest.raises(QuantVLAError, match="cannot be trained"):
            ask()
    batch = batch_of(observation(0))
    with pytest.raises(QuantVLAError, match=r"'observation.state': is missing.*rename_map"):
        lerobot_policy.select_action({key: batch[key] for key in (CAMERA, "task")})
    with pytest.raises(QuantVLAError, match=f"'{CAMERA}': camera image is missing"):
        lerobot_policy.select_action({key: batch[key] for key in ("observation.state", "task")})
