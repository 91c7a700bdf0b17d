from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_observations import random_observation
from safetensors.torch import load_file, save_file

from quantvla import staged
from quantvla.families import load_policy
from quantvla.float_policy import FloatPolicy
from quantvla.layout import make_plan
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


def test_stages_compute_what_lerobot_computes(tiny_checkpoint: Path, tiny_size: Any) -> None:
    assert stages_against_lerobot(tiny_checkpoint, random_observation(tiny_size, 0)) < 1e-5


def test_empty_cameras_and_image_markers_are_reproduced(tmp_path: Path, tiny_size: Any) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "policy", tiny_size)
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"empty_cameras": 1, "add_image_special_tokens": True, "prefix_length": 48}
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert stages_against_lerobot(checkpoint, random_observation(tiny_size, 0)) < 1e-5
    assert load_policy(checkpoint).stage("prefix").outputs[2].shape == (1, 48)


def test_cutting_the_padded_prompt_is_exact(tiny_checkpoint: Path, tiny_size: Any) -> None:
    loaded = load_policy(tiny_checkpoint)
    tensors = staged.prepare(
        staged.make_preprocessor(loaded.interface), random_observation(tiny_size, 3)
    )
    cut = staged.without_padding(loaded, tensors)
    assert cut["tokens"].shape[1] < tensors["tokens"].shape[1]
    noise = np.random.default_rng(0).standard_normal(
        loaded.interface.sampler.noise_shape, np.float32
    )
    whole = staged.sample(loaded, staged.run_context(loaded, tensors), noise)
    assert (
        np.abs(staged.sample(loaded, staged.run_context(loaded, cut), noise) - whole).max() < 1e-5
    )


def test_declared_shapes_are_what_the_stages_produce(tiny_checkpoint: Path, tiny_size: Any) -> None:
    loaded = load_policy(tiny_checkpoint)
    known = staged.prepare(
        staged.make_preprocessor(loaded.interface), random_observation(tiny_size, 0)
    )
    known |= {
        "x": np.zeros(loaded.interface.sampler.noise_shape, np.float32),
        "timestep": np.ones(1, np.float32),
    }
    for stage in loaded.stages:
        known |= staged.run_stage(stage, known)
        for spec in (*stage.inputs, *stage.outputs):
            assert (
                known[spec.name].shape == spec.shape and str(known[spec.name].dtype) == spec.dtype
            )


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


def test_dropped_linears_do_not_influence_the_action(tiny_checkpoint: Path, tiny_size: Any) -> None:
    policy = FloatPolicy(load_policy(tiny_checkpoint))
    observation, noise = random_observation(tiny_size, 0), policy.sample_noise(0)
    before = policy.predict_normalized(observation, noise=noise)
    for site in policy.loaded.sites:
        if site.unused:
            torch.nn.init.zeros_(policy.loaded.policy.get_submodule(site.name).weight)
    assert np.array_equal(policy.predict_normalized(observation, noise=noise), before)


def test_producers_and_siblings_exist(tiny_checkpoint: Path) -> None:
    loaded = load_policy(tiny_checkpoint)
    names = {site.name for site in loaded.sites}
    modules = dict(loaded.policy.named_modules())
    for site in loaded.sites:
        assert set(site.siblings) <= names
        assert site.producer is None or site.producer in modules


def test_the_checkpoint_loads_after_it_was_moved(
    copy: Path, tiny_size: Any, tmp_path: Path
) -> None:
    moved = copy.rename(tmp_path / "elsewhere")
    assert stages_against_lerobot(moved, random_observation(tiny_size, 0)) < 1e-5


def test_missing_weights_are_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if "lm_expert" in name)
    save_file(
        {key: value for key, value in weights.items() if key != name}, copy / "model.safetensors"
    )
    with pytest.raises(
        QuantVLAError, match=r"weights do not match the policy, got 1 missing \(model.*lm_expert"
    ):
        load_policy(copy)


def test_unexpected_weights_are_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors") | {"stray": torch.zeros(1)}
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(QuantVLAError, match=r"0 missing \(\), 1 unexpected \(stray\)"):
        load_policy(copy)


def test_weights_of_another_shape_are_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["model.state_proj.bias"] = torch.zeros(3)
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(QuantVLAError, match="other shapes than the configuration says"):
        load_policy(copy)


def test_truncated_weights_are_refused(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(QuantVLAError, match="cannot be read as safetensors"):
        load_policy(copy)


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
    with pytest.raises(QuantVLAError, match="known: smolvla"):
        load_policy(copy)


def test_missing_vlm_processors_and_statistics(copy: Path) -> None:
    (copy / "vlm").rename(copy / "vlm_gone")
    with pytest.raises(
        QuantVLAError, match="its VLM configuration and tokenizer are not on this machine, got vlm"
    ):
        load_policy(copy)
    (copy / "vlm_gone").rename(copy / "vlm")
    state = next(copy.glob("policy_preprocessor_step_*.safetensors"))
    state.rename(copy / "gone")
    with pytest.raises(QuantVLAError, match="normalization statistics are missing"):
        load_policy(copy)
    (copy / "policy_preprocessor.json").unlink()
    with pytest.raises(
        QuantVLAError, match=r"has no policy_preprocessor.json, so normalization is unknown"
    ):
        load_policy(copy)


def test_an_unknown_processor_step_is_refused(copy: Path) -> None:
    path = copy / "policy_preprocessor.json"
    pipeline = json.loads(path.read_text())
    pipeline["steps"].insert(0, {"registry_name": "image_crop_resize_processor", "config": {}})
    path.write_text(json.dumps(pipeline))
    with pytest.raises(
        QuantVLAError, match="cannot be reproduced at run time, got 'image_crop_resize_processor'"
    ):
        load_policy(copy)


def test_renamed_cameras_are_known_by_the_robots_names(copy: Path) -> None:
    path = copy / "policy_preprocessor.json"
    pipeline = json.loads(path.read_text())
    for step in pipeline["steps"]:
        if step["registry_name"] == "rename_observations_processor":
            step["config"]["rename_map"] = {"observation.images.top": "observation.images.front"}
    path.write_text(json.dumps(pipeline))
    assert [camera.key for camera in load_policy(copy).interface.cameras] == [
        "observation.images.top",
        "observation.images.wrist",
    ]


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
