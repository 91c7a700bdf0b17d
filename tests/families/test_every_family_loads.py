"""What holds for every family's checkpoint: it loads exactly or not at all, and its stages are lerobot's policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_observations import random_observation
from safetensors.torch import load_file, save_file

from quantvla import staged
from quantvla.families import FAMILIES, load_policy
from quantvla.families.base import LoadedPolicy
from quantvla.float_policy import FloatPolicy
from quantvla.layout import make_plan
from quantvla.recipe import read_recipe
from quantvla.runtime.errors import QuantVLAError
from quantvla.site_tokens import count_site_tokens
from quantvla.testing.tiny import TINY


def test_every_family_has_a_tiny_policy() -> None:
    assert TINY.keys() == FAMILIES.keys()


def context_of(loaded: LoadedPolicy, observation: dict[str, Any]) -> dict[str, Any]:
    return staged.prepare(staged.make_preprocessor(loaded.interface), observation)


def stages_against_lerobot(checkpoint: Path, observation: dict[str, Any]) -> float:
    """Return the largest difference between the staged policy and lerobot's own sampling loop."""
    policy = FloatPolicy(load_policy(checkpoint))
    noise = policy.sample_noise(seed=1)
    loaded = policy.loaded
    context = staged.run_context(loaded, context_of(loaded, observation))
    ours = loaded.interface.action.of(staged.sample(loaded, context, noise))
    return float(np.abs(ours - policy.predict_normalized(observation, noise=noise)).max())


def test_stages_compute_what_lerobot_computes(checkpoint: Path, size: Any) -> None:
    assert stages_against_lerobot(checkpoint, random_observation(size, 0)) < 1e-5


def test_declared_shapes_are_what_the_stages_produce(checkpoint: Path, size: Any) -> None:
    loaded = load_policy(checkpoint)
    sampler = loaded.interface.sampler
    known = context_of(loaded, random_observation(size, 0))
    known |= {
        sampler.state: np.zeros(sampler.noise_shape, np.float32),
        sampler.time: np.array([sampler.timesteps[0]], np.float32),
    }
    for stage in loaded.stages:
        known |= staged.run_stage(stage, known)
        for spec in (*stage.inputs, *stage.outputs):
            assert known[spec.name].shape == spec.shape
            assert str(known[spec.name].dtype) == spec.dtype


def test_observation_noise_and_time_matter(checkpoint: Path, size: Any) -> None:
    """A policy whose random weights hide a path would let every other test of that path pass."""
    loaded = load_policy(checkpoint)
    sampler = loaded.interface.sampler
    contexts = [
        staged.run_context(loaded, context_of(loaded, random_observation(size, seed, task)))
        for seed, task in ((0, "push the red block"), (1, "push the red block"), (0, "open the door"))
    ]  # fmt: skip
    x = np.random.default_rng(0).standard_normal(sampler.noise_shape, np.float32)
    first, *_, last = sampler.timesteps
    base = staged.velocity(loaded, contexts[0], x, first)
    others = [
        staged.velocity(loaded, contexts[1], x, first),
        staged.velocity(loaded, contexts[2], x, first),
        staged.velocity(loaded, contexts[0], 2 * x, first),
        staged.velocity(loaded, contexts[0], x, last),
    ]
    assert all(np.abs(other - base).max() > 1e-4 for other in others)


def test_stacked_calls_of_the_denoise_stage_are_single_ones(checkpoint: Path, size: Any) -> None:
    loaded = load_policy(checkpoint)
    sampler, stage = loaded.interface.sampler, loaded.stage(loaded.interface.sampler.stage)
    if not stage.batch_axes:
        pytest.skip("takes one call at a time")
    known = staged.run_context(loaded, context_of(loaded, random_observation(size, 0)))
    rng = np.random.default_rng(0)
    calls = [
        {
            **known,
            sampler.state: rng.standard_normal(sampler.noise_shape, np.float32),
            sampler.time: np.array([time], np.float32),
        }
        for time in sampler.timesteps[:2]
    ]
    stacked = {
        spec.name: np.concatenate([call[spec.name] for call in calls], axis)
        for spec, axis in zip(stage.inputs, stage.batch_axes, strict=True)
    }
    together = staged.run_stage(stage, stacked)[sampler.velocity]
    singles = [staged.run_stage(stage, call)[sampler.velocity] for call in calls]
    assert np.abs(together - np.concatenate(singles)).max() < 1e-5


def test_cutting_the_padded_prompt_is_exact(checkpoint: Path, size: Any) -> None:
    loaded = load_policy(checkpoint)
    tensors = context_of(loaded, random_observation(size, 3))
    cut = staged.without_padding(loaded, tensors)
    noise = np.random.default_rng(0).standard_normal(
        loaded.interface.sampler.noise_shape, np.float32
    )
    whole, short = (
        staged.sample(loaded, staged.run_context(loaded, known), noise) for known in (tensors, cut)
    )
    assert np.abs(whole - short).max() < 1e-5


def test_every_linear_is_described_and_every_used_one_is_reached(checkpoint: Path) -> None:
    loaded = load_policy(checkpoint)
    modules = dict(loaded.policy.named_modules())
    linears = {name for name, module in modules.items() if isinstance(module, torch.nn.Linear)}
    assert {site.name for site in loaded.sites} == linears
    for site in loaded.sites:
        assert set(site.siblings) <= linears
        assert site.producer is None or site.producer in modules
    assert count_site_tokens(loaded).keys() >= {site.name for site in loaded.used_sites}


def test_the_structure_names_modules_that_are_there(checkpoint: Path) -> None:
    loaded = load_policy(checkpoint)
    modules, structure = dict(loaded.policy.named_modules()), loaded.structure
    names = [name for norm in structure.norms for name in (norm.name, *norm.readers)]
    names += [norm.modulation.linear for norm in structure.norms if norm.modulation]
    names += [name for entry in structure.attentions for name in (entry.q, entry.o)]
    names += [name for heads in structure.values for name in heads.writers]
    names += [reader.site for heads in structure.values for reader in heads.readers]
    names += [name for mlp in structure.mlps for name in (mlp.up, mlp.down, mlp.gate) if name]
    names += [name for stream in structure.streams for name in (*stream.writers, *stream.norms)]
    assert set(names) <= modules.keys()
    assert {"expert"} <= {attention.part for attention in structure.attentions}


def test_the_tap_shows_the_attention_of_the_action_head(checkpoint: Path, size: Any) -> None:
    loaded = load_policy(checkpoint)
    stage = loaded.stage(loaded.interface.sampler.stage)
    sampler = loaded.interface.sampler
    known = staged.run_context(loaded, context_of(loaded, random_observation(size, 0)))
    known[sampler.state] = np.zeros(sampler.noise_shape, np.float32)
    known[sampler.time] = np.array([sampler.timesteps[0]], np.float32)
    seen: dict[str, tuple[int, ...]] = {}

    def see(query: str, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor) -> None:
        assert q.shape[:2] == k.shape[:2] and mask.shape == (1, q.shape[2], k.shape[2])
        assert mask.dtype == torch.bool and bool(mask.any(-1).all())
        seen[query] = (q.shape[1], q.shape[3])

    with loaded.tap_attention(see):
        staged.run_stage(stage, known)
    heads = {a.q: (a.heads, a.head_dim) for a in loaded.structure.attentions if a.part == "expert"}
    assert seen == heads


def test_the_layout_is_the_language_model_and_the_heads_mlps(checkpoint: Path) -> None:
    loaded = load_policy(checkpoint)
    plan = make_plan(loaded.sites, read_recipe("quantvla-w4a8"))
    layout = {entry.site for entry in (*plan.quantized, *plan.dropped)}
    wanted = {
        site.name
        for site in loaded.sites
        if (site.part == "llm" and site.role in ("attention", "mlp"))
        or (site.part == "expert" and site.role == "mlp")
    }
    assert wanted <= layout
    assert {entry.site for entry in plan.quantized} <= wanted
    assert plan.saving() >= 0.7


def test_dropped_linears_do_not_influence_the_action(checkpoint: Path, size: Any) -> None:
    policy = FloatPolicy(load_policy(checkpoint))
    observation, noise = random_observation(size, 0), policy.sample_noise(0)
    before = policy.predict_normalized(observation, noise=noise)
    for site in policy.loaded.sites:
        if site.unused:
            torch.nn.init.zeros_(policy.loaded.policy.get_submodule(site.name).weight)
    assert np.array_equal(policy.predict_normalized(observation, noise=noise), before)


def test_the_checkpoint_loads_after_it_was_moved(copy: Path, size: Any, tmp_path: Path) -> None:
    moved = copy.rename(tmp_path / "elsewhere")
    assert stages_against_lerobot(moved, random_observation(size, 0)) < 1e-5


# ------------------------------------------------------------------------------------ bad input
def weights_file(checkpoint: Path) -> Path:
    return max(checkpoint.rglob("model*.safetensors"), key=lambda path: path.stat().st_size)


def weight_of_the_head(checkpoint: Path) -> str:
    sites = [s for s in load_policy(checkpoint).used_sites if s.part == "expert"]
    stored = load_file(weights_file(checkpoint))
    wanted = sites[-1].name + ".weight"
    return next(name for name in stored if wanted.endswith(name))


def test_missing_weights_are_refused(copy: Path) -> None:
    name, path = weight_of_the_head(copy), weights_file(copy)
    save_file({key: value for key, value in load_file(path).items() if key != name}, path)
    with pytest.raises(
        QuantVLAError, match=r"weights do not match the policy, got 1 missing \(.*layers|blocks"
    ):
        load_policy(copy)


def test_unexpected_weights_are_refused(copy: Path) -> None:
    path = weights_file(copy)
    save_file(load_file(path) | {"model.stray": torch.zeros(1)}, path)
    with pytest.raises(QuantVLAError, match=r"0 missing \(\), 1 unexpected \(.*stray\)"):
        load_policy(copy)


def test_weights_of_another_shape_are_refused(copy: Path) -> None:
    name, path = weight_of_the_head(copy), weights_file(copy)
    save_file(load_file(path) | {name: torch.zeros(3, 5)}, path)
    with pytest.raises(QuantVLAError, match="other shapes than the configuration says"):
        load_policy(copy)


def test_truncated_weights_are_refused(copy: Path) -> None:
    path = weights_file(copy)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(QuantVLAError, match="cannot be read as safetensors"):
        load_policy(copy)


def test_no_weights_at_all(copy: Path) -> None:
    weights_file(copy).unlink()
    with pytest.raises(QuantVLAError, match=r"has no model.safetensors; copy the whole"):
        load_policy(copy)


def test_missing_processors_and_statistics(copy: Path) -> None:
    state = next(copy.glob("policy_preprocessor_step_*.safetensors"))
    state.rename(copy / "gone")
    with pytest.raises(QuantVLAError, match="normalization statistics are missing"):
        load_policy(copy)
    (copy / "policy_preprocessor.json").unlink()
    with pytest.raises(
        QuantVLAError, match=r"has no policy_preprocessor.json, so normalization is unknown"
    ):
        load_policy(copy)


def edit_steps(checkpoint: Path, edit: Any) -> None:
    path = checkpoint / "policy_preprocessor.json"
    pipeline = json.loads(path.read_text())
    edit(pipeline["steps"])
    path.write_text(json.dumps(pipeline))


def test_an_unknown_processor_step_is_refused(copy: Path) -> None:
    unknown = {"registry_name": "image_crop_resize_processor", "config": {}}
    edit_steps(copy, lambda steps: steps.insert(0, unknown))
    with pytest.raises(
        QuantVLAError, match="cannot be reproduced at run time, got 'image_crop_resize_processor'"
    ):
        load_policy(copy)


def test_renamed_cameras_are_known_by_the_robots_names(copy: Path) -> None:
    def rename(steps: list[dict[str, Any]]) -> None:
        for step in steps:
            if step["registry_name"] == "rename_observations_processor":
                step["config"]["rename_map"] = {
                    "observation.images.top": "observation.images.front"
                }

    edit_steps(copy, rename)
    assert [camera.key for camera in load_policy(copy).interface.cameras] == [
        "observation.images.top",
        "observation.images.wrist",
    ]
