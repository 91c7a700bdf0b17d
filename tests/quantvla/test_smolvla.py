from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_observations import random_observation

from quantvla import staged
from quantvla.calib_sets import open_set
from quantvla.checkpoint import load_quantized
from quantvla.families import load_policy
from quantvla.float_policy import FloatPolicy
from quantvla.layout import make_plan
from quantvla.quantize import quantize
from quantvla.recipe import read_recipe
from quantvla.runtime.errors import QuantVLAError
from quantvla.testing.smolvla import write_random_checkpoint


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def stages_against_lerobot(checkpoint: Path, observation: dict[str, Any]) -> float:
    """Return the largest difference between the staged policy and lerobot's own sampling loop."""
    policy = FloatPolicy(load_policy(checkpoint))
    noise = policy.sample_noise(seed=1)
    loaded = policy.loaded
    context = staged.run_context(
        loaded, staged.prepare(staged.make_preprocessor(loaded.interface), observation)
    )
    ours = staged.sample(loaded, context, noise)[0, :, : loaded.interface.action.dim]
    return float(np.abs(ours - policy.predict_normalized(observation, noise=noise)).max())


def test_empty_cameras_and_image_markers_are_reproduced(tmp_path: Path, tiny_size: Any) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "policy", tiny_size)
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"empty_cameras": 1, "add_image_special_tokens": True, "prefix_length": 48}
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert stages_against_lerobot(checkpoint, random_observation(tiny_size, 0)) < 1e-5
    assert load_policy(checkpoint).stage("prefix").outputs[2].shape == (1, 48)


def test_the_layout_is_every_llm_linear_and_the_experts_mlp(
    tiny_checkpoint: Path, tiny_size: Any
) -> None:
    plan = make_plan(load_policy(tiny_checkpoint).sites, read_recipe("w4a8"))
    kinds = Counter((entry.part, entry.kind) for entry in plan.quantized)
    layers = tiny_size.layers
    for kind in ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert (
            kinds.pop(("llm", kind)) == layers - 1
        )  # of the last layer only keys and values are read
    for kind in ("k_proj", "v_proj"):
        assert kinds.pop(("llm", kind)) == layers
    for kind in ("gate_proj", "up_proj", "down_proj"):
        assert kinds.pop(("expert", kind)) == layers
    assert not kinds
    assert plan.saving() >= 0.7


def test_no_checkpoint_no_config_other_family(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantVLAError, match=r"not a LeRobot checkpoint \(no config.json\)"):
        load_policy(tmp_path / "nothing")
    (copy / "config.json").write_text("{")
    with pytest.raises(QuantVLAError, match="not the configuration of a LeRobot policy"):
        load_policy(copy)
    (copy / "config.json").write_text('{"type": "smolvlaa"}')
    with pytest.raises(
        QuantVLAError,
        match="policy type has no family here, got 'smolvlaa'; did you mean 'smolvla'",
    ):
        load_policy(copy)
    (copy / "config.json").write_text('{"type": "act"}')
    with pytest.raises(QuantVLAError, match="known: groot, pi0, pi05, smolvla"):
        load_policy(copy)


def test_a_vlm_that_is_not_there_is_named(copy: Path) -> None:
    (copy / "vlm").rename(copy / "vlm_gone")
    with pytest.raises(
        QuantVLAError, match="its VLM configuration and tokenizer are not on this machine, got vlm"
    ):
        load_policy(copy)


def test_other_sizes_and_depths(tmp_path: Path, tiny_size: Any) -> None:
    size = replace(
        tiny_size,
        layers=2,
        heads=2,
        key_value_heads=1,
        camera_height=40,
        camera_width=96,
        chunk=5,
        execute=5,
    )
    checkpoint = write_random_checkpoint(tmp_path / "policy", size, seed=7)
    assert stages_against_lerobot(checkpoint, random_observation(size, 2)) < 1e-5


def test_a_vlm_from_elsewhere_comes_along(copy: Path, tiny_set: Path, tmp_path: Path) -> None:
    elsewhere = (copy / "vlm").rename(tmp_path / "elsewhere")
    config = json.loads((copy / "config.json").read_text())
    config["vlm_model_name"] = str(elsewhere)
    (copy / "config.json").write_text(json.dumps(config))
    output = tmp_path / "out"
    quantize(copy, open_set(tiny_set), read_recipe("rtn-w4a8"), output)
    shutil.rmtree(elsewhere)
    loaded, card = load_quantized(output)
    assert len(card.plan.quantized) > 0 and "tokenizer.json" in loaded.interface.files
