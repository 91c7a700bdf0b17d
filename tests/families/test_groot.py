"""What only GR00T has: AdaLN tables, two contexts, one embodiment, bicubic images, a prompt of one layout."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from lerobot.policies.groot.groot_n1_7 import GR00TN17ActionHead
from lerobot.policies.groot.processor_groot import _transform_n1_7_image_for_vlm_torch
from random_observations import random_observation
from safetensors.torch import load_file, save_file

from quantvla import staged
from quantvla.calib_sets import CalibrationSet
from quantvla.export.engine import export_engine
from quantvla.export.integers import integer_sites
from quantvla.families import load_policy
from quantvla.families.groot import describe_sites, empty_policy
from quantvla.families.qwen3_vl import find_images
from quantvla.float_policy import FloatPolicy
from quantvla.layout import make_plan
from quantvla.quantize import quantize
from quantvla.recipe import read_recipe
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.manifest import read_manifest
from quantvla.runtime.policy import Policy
from quantvla.runtime.postprocess import Postprocessor
from quantvla.runtime.resample import centre_crop, pad_to_square, resample
from quantvla.testing import groot


@pytest.fixture
def copy(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("groot"), tmp_path / "copy"))


@pytest.fixture(scope="module")
def engine(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("groot_engine") / "engine"
    export_engine(tiny("groot"), "cpu", output)
    return output


def edit(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_step(checkpoint: Path, name: str, file: str = "policy_preprocessor.json", **config: Any) -> None:  # fmt: skip
    def change(pipeline: Any) -> None:
        (step,) = [s for s in pipeline["steps"] if s["registry_name"] == name]
        step["config"].update(config)

    edit(checkpoint / file, change)


PACK, ENCODE = "groot_n1_7_pack_inputs_v1", "groot_n1_7_vlm_encode_v1"


# ------------------------------------------------------------------------------- preprocessing
@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("size", [(48, 64), (480, 640), (131, 77), (256, 256), (720, 1280)])
def test_images_are_resampled_to_the_same_bytes(size: tuple[int, int], square: bool) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    expected = _transform_n1_7_image_for_vlm_torch(
        torch.from_numpy(image).permute(2, 0, 1).contiguous(), image_crop_size=[230, 230],
        image_target_size=[256, 256], shortest_image_edge=None, crop_fraction=None,
        letter_box_transform=square,
    )  # fmt: skip
    first = resample(pad_to_square(image) if square else image, (256, 256))
    found = resample(centre_crop(first, (230, 230)), (256, 256))
    assert np.array_equal(found, expected.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("task", ["push the block", "Push_the red\tBLOCK, now!", "!?"])
def test_the_models_inputs_are_lerobots(tiny: Callable[[str], Path], task: str) -> None:
    policy = FloatPolicy(load_policy(tiny("groot")))
    interface = policy.loaded.interface
    observation = random_observation(groot.GrootSize(), 1, task=task)
    observation["observation.state"] = 40 * observation["observation.state"]  # cut at the ends
    found = staged.prepare(staged.make_preprocessor(interface), observation)
    batch = policy._before(policy._batch(observation))
    length = int(found["token_mask"].sum())
    assert np.array_equal(found["tokens"][:, :length], batch["input_ids"].numpy())
    assert bool(batch["attention_mask"].all())
    assert np.abs(found["state"] - batch["state"][:, 0].numpy()).max() < 1e-5
    assert np.abs(found["state"]).max() == 1.0
    patches = batch["pixel_values"].view(2, 2, 2, 2, 2, 3, 2, 16, 16)  # the last 2 are frames
    images = patches.permute(0, 5, 6, 1, 3, 7, 2, 4, 8).reshape(2, 3, 2, 64, 64).numpy()
    for frame in (0, 1):
        assert np.abs(found["images"] - images[:, :, frame]).max() < 1e-5


def test_a_state_entry_that_never_changed_is_zero(copy: Path) -> None:
    file = next(copy.glob("policy_preprocessor_step_*.safetensors"))
    statistics = load_file(file)
    statistics["observation.state.max"][2] = statistics["observation.state.min"][2]
    save_file(statistics, file)
    policy = FloatPolicy(load_policy(copy))
    observation = random_observation(groot.GrootSize(), 0)
    found = staged.prepare(staged.make_preprocessor(policy.loaded.interface), observation)
    theirs = policy._before(policy._batch(observation))["state"][:, 0].numpy()
    assert found["state"][0, 2] == 0 and np.abs(found["state"] - theirs).max() < 1e-5


def test_actions_are_cut_before_they_are_scaled(tiny: Callable[[str], Path], engine: Path) -> None:
    policy = FloatPolicy(load_policy(tiny("groot")))
    chunk = 3 * np.random.default_rng(0).standard_normal((1, 10, 24), np.float32)
    with Policy.from_pretrained(engine, threads=1) as ours:
        found = ours.postprocessor(chunk)
    theirs = policy._after(torch.from_numpy(chunk[0, :8, :4])).numpy()
    assert found.shape == (8, 4) and np.abs(found - theirs).max() < 1e-5


# ---------------------------------------------------------------------- compile-time simplifications
def test_the_head_has_tables_no_time_weights_and_no_keys_of_its_context(engine: Path) -> None:
    graphs = {
        name: onnx.load(engine / f"{name}.onnx", load_external_data=False).graph
        for name in ("vision", "prefix", "denoise")
    }
    denoise = {tensor.name for tensor in graphs["denoise"].initializer}
    assert not any("norm1" in name or "timestep" in name.removeprefix("timestep.table") for name in denoise)  # fmt: skip
    size, width = groot.GrootSize(), 64
    tables = [t for t in graphs["denoise"].initializer if t.name.endswith(".table")]
    assert len(tables) == 2 * (size.blocks + 1) + 2  # scale and shift, of tokens, and the times
    cross, own = size.blocks // 2, size.blocks // 2
    weights = Counter(tuple(t.dims) for t in graphs["denoise"].initializer if len(t.dims) == 2)
    # Square linears of the width: q and o of every block, k and v of those that attend to themselves.
    assert weights[(width, width)] == 2 * cross + 4 * own + 2  # and two of the action encoder
    assert {i.name for i in graphs["denoise"].input} >= {"x", "timestep", "state_features"}
    assert not any(i.name == "state" for i in graphs["denoise"].input)
    assert read_manifest(engine).sampler.only_own_times


def test_one_embodiment_is_left_and_only_it_matters(copy: Path, tmp_path: Path, engine: Path) -> None:  # fmt: skip
    tensors = [
        tensor
        for name in ("prefix", "denoise")
        for tensor in onnx.load(engine / f"{name}.onnx", load_external_data=False).graph.initializer
    ]
    size = groot.GrootSize()
    assert not any(size.embodiments in tensor.dims[:1] for tensor in tensors)
    observation, noise = random_observation(size, 0), np.zeros((1, 10, 24), np.float32)
    before = FloatPolicy(load_policy(copy)).predict_normalized(observation, noise=noise)
    path = copy / "model.safetensors"
    for chosen, same in ((3, True), (10, False)):  # new_embodiment is number 10
        weights = load_file(path)
        for name, value in weights.items():
            if name.endswith((".W", ".b")):
                value[chosen] += 0.1
        save_file(weights, path)
        loaded = load_policy(copy)
        context = staged.run_context(
            loaded, staged.prepare(staged.make_preprocessor(loaded.interface), observation)
        )
        after = loaded.interface.action.of(staged.sample(loaded, context, noise))
        assert (np.abs(after - before).max() < 1e-5) == same


@pytest.mark.parametrize("steps", [1, 3, 5, 10])
def test_times_are_the_whole_numbers_that_lerobot_takes(tmp_path: Path, steps: int) -> None:
    size = replace(groot.GrootSize(), options={"num_inference_timesteps": steps})
    policy = FloatPolicy(load_policy(groot.write_random_checkpoint(tmp_path / "groot", size)))
    seen: list[float] = []
    head = policy.loaded.policy._groot_model.action_head
    assert isinstance(head, GR00TN17ActionHead)
    handle = head.model.timestep_encoder.register_forward_pre_hook(
        lambda _module, inputs: seen.append(float(inputs[0][0]))
    )
    observation, noise = random_observation(size, 0), policy.sample_noise(1)
    theirs = policy.predict_normalized(observation, noise=noise)
    expected, seen[:] = list(seen), []
    loaded = policy.loaded
    context = staged.run_context(
        loaded, staged.prepare(staged.make_preprocessor(loaded.interface), observation)
    )
    ours = loaded.interface.action.of(staged.sample(loaded, context, noise))
    handle.remove()
    assert seen == expected and len(seen) == steps
    assert np.abs(ours - theirs).max() < 1e-5


def test_image_tokens_are_found() -> None:
    assert find_images([1, 5, 5, 2, 5, 3], 5) == ((1, 3), (4, 5))


# ----------------------------------------------------------------------------------- the layout
def test_the_layout_of_the_released_model(tmp_path: Path) -> None:
    """The analog of the paper's: 7 linears of 16 layers, 2 of 32 blocks; attention of the head stays float."""
    size = groot.FULL_SIZE
    tokenizer = groot.make_tokenizer(("push",), 640)
    groot.write_backbone(tmp_path / "backbone", size, tokenizer)
    base = groot.make_base_config(size, str(tmp_path / "backbone"))
    sites = describe_sites(empty_policy(groot.make_config(tmp_path, size), base))
    plan = make_plan(sites, read_recipe("quantvla-w4a8"))
    assert Counter(entry.part for entry in plan.quantized) == {"llm": 16 * 7, "expert": 32 * 2}
    assert [entry.kind for entry in plan.dropped] == ["lm_head"]
    assert plan.saving() > 0.7
    weights = sum(s.out_features * s.in_features for s in sites if s.role == "modulation")
    assert weights == (32 + 1) * 3072 * 1536 + 1536 * (1536 + 256)  # become tables


def test_vision_tower_and_attention_of_the_head_become_integers_too(
    tiny: Callable[[str], Path], frames: CalibrationSet, tmp_path: Path
) -> None:
    """Fused queries, keys and values, keys and values that move to the prefix, and the blocks between."""
    result = quantize(tiny("groot"), frames, read_recipe("int8"), tmp_path / "int8")
    parts = Counter(entry.part for entry in result.plan.quantized)
    assert parts == {"vision": 12, "connector": 18, "llm": 21, "expert": 24}
    export_engine(tmp_path / "int8", "cpu", tmp_path / "engine")
    found = Counter(s.site for s in integer_sites(tmp_path / "engine", read_manifest(tmp_path / "engine")))  # fmt: skip
    assert found == Counter(entry.site for entry in result.plan.quantized)
    observation = random_observation(groot.GrootSize(), 0)
    reference = FloatPolicy(load_policy(tiny("groot")))
    with Policy.from_pretrained(tmp_path / "engine", threads=1) as policy:
        noise = policy.sample_noise(0)
        actions = policy.predict_action_chunk(observation, noise=noise)
    error = np.abs(actions - reference.predict_action_chunk(observation, noise=noise))
    assert 1e-5 < error.max() < 0.2


# ------------------------------------------------------------------------------------ bad input
def test_a_base_model_that_is_nowhere_is_named(copy: Path) -> None:
    shutil.rmtree(copy / "base")
    edit(copy / "config.json", lambda c: c.update(base_model_path="nvidia/GR00T-N1.7-3B"))
    with pytest.raises(
        QuantVLAError,
        match=r"base model's configuration is not on this machine, got nvidia/GR00T-N1.7-3B; "
        r"copy that model's config.json into the checkpoint as `base/config.json`",
    ):
        load_policy(copy)


def test_a_vision_language_model_that_is_nowhere_is_named(copy: Path) -> None:
    shutil.rmtree(copy / "backbone")
    edit(copy / "base" / "config.json", lambda c: c.update(model_name="org/unknown-vlm"))
    with pytest.raises(
        QuantVLAError,
        match=r"its vision-language model is not on this machine, got org/unknown-vlm",
    ):
        load_policy(copy)


def test_a_tokenizer_that_is_nowhere_is_named(copy: Path) -> None:
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(
        QuantVLAError, match=r"tokenizer is not on this machine, got nvidia/Cosmos-Reason2-2B"
    ):
        load_policy(copy)


def test_an_embodiment_that_is_not_there_is_refused(copy: Path) -> None:
    edit_step(copy, PACK, embodiment_tag="new_embodyment")
    with pytest.raises(
        QuantVLAError,
        match=r"tag is not among those of the checkpoint, got 'new_embodyment'; .*new_embodiment",
    ):
        load_policy(copy)
    edit_step(copy, PACK, embodiment_tag="libero_sim", embodiment_mapping={"libero_sim": 31})
    with pytest.raises(QuantVLAError, match=r"no weights for, got 31; the base model has 12"):
        load_policy(copy)


def test_other_cameras_than_the_checkpoints_are_refused(copy: Path) -> None:
    edit_step(copy, PACK, video_modality_keys=["wrist", "front"])
    keys = [camera.key for camera in load_policy(copy).interface.cameras]
    assert keys == ["observation.images.wrist", "observation.images.front"]
    for wanted in (["front"], ["front", "wrist", "side"]):
        edit_step(copy, PACK, video_modality_keys=wanted)
        with pytest.raises(QuantVLAError, match="expected the cameras that the checkpoint was trained with"):  # fmt: skip
            load_policy(copy)


def test_missing_statistics_of_the_embodiment_are_named(copy: Path) -> None:
    file = next(copy.glob("policy_preprocessor_step_*.safetensors"))
    kept = {name: value for name, value in load_file(file).items() if name.startswith("action")}
    save_file(kept, file)
    with pytest.raises(QuantVLAError, match="no statistics of the state for embodiment 'new_embodiment'"):  # fmt: skip
        load_policy(copy)


def test_missing_statistics_of_actions_are_named(copy: Path) -> None:
    file = next(copy.glob("policy_postprocessor_step_*.safetensors"))
    kept = {name: value for name, value in load_file(file).items() if not name.startswith("action")}
    save_file(kept, file)
    with pytest.raises(QuantVLAError, match="has no statistics of the actions"):
        load_policy(copy)


@pytest.mark.parametrize(
    ("step", "config", "message"),
    [
        (PACK, {"video_horizon": 2}, "takes several images of a camera at a time, got 2"),
        (ENCODE, {"use_albumentations": True}, "no run-time form here, got use_albumentations"),
        (ENCODE, {"image_target_size": None}, "no run-time form here, got no image_target_size"),
        (ENCODE, {"image_target_size": [60, 60]}, "must be a multiple of 32 .*, got 60x60"),
    ],
)
def test_preprocessing_without_a_run_time_form_is_refused(
    copy: Path, step: str, config: dict[str, Any], message: str
) -> None:
    edit_step(copy, step, **config)
    with pytest.raises(QuantVLAError, match=message):
        load_policy(copy)


GROUPS = {"action": {"modality_keys": ["arm", "gripper"], "action_configs": []}}
RANGES = {"action": {"arm": {"q01": [-1, -2, -3], "q99": [1, 2, 3]}, "gripper": {"q01": [0], "q99": [1]}}}  # fmt: skip


def decode_by_groups(checkpoint: Path, **config: Any) -> None:
    """Give the checkpoint the decoding step of a base checkpoint."""
    own = {
        "env_action_dim": 4,
        "raw_stats": RANGES,
        "modality_config": GROUPS,
        "use_percentiles": True,
    }
    step = {"registry_name": "groot_n1_7_action_decode_v1", "config": own | config}
    edit(checkpoint / "policy_postprocessor.json", lambda p: p["steps"].__setitem__(0, step))


def test_groups_of_a_base_checkpoint_are_decoded(copy: Path) -> None:
    decode_by_groups(copy)
    policy = FloatPolicy(load_policy(copy))
    actions = policy.loaded.interface.statistics["action"]
    assert actions.min == (-1, -2, -3, 0) and actions.max == (1, 2, 3, 1)
    chunk = 2 * np.random.default_rng(0).standard_normal((1, 8, 4), np.float32)
    theirs = policy._after(torch.from_numpy(chunk)).numpy()[0]
    low, high = np.array(actions.min), np.array(actions.max)
    ours = (chunk[0].clip(-1, 1) + 1) * (high - low) / 2 + low
    assert np.abs(ours - theirs).max() < 1e-5


def test_lerobots_relative_actions_get_their_state_back(copy: Path) -> None:
    relative = {"enabled": True, "exclude_joints": [], "action_names": None}
    first = {"registry_name": "relative_actions_processor", "config": relative}
    last = {"registry_name": "absolute_actions_processor", "config": {"enabled": True}}
    edit(copy / "policy_preprocessor.json", lambda p: p["steps"].insert(2, first))
    edit(copy / "policy_postprocessor.json", lambda p: p["steps"].insert(1, last))
    policy = FloatPolicy(load_policy(copy))
    interface, observation = policy.loaded.interface, random_observation(groot.GrootSize(), 0)
    noise = policy.sample_noise(0)
    tensors = staged.prepare(staged.make_preprocessor(interface), observation)
    chunk = staged.sample(policy.loaded, staged.run_context(policy.loaded, tensors), noise)
    ours = Postprocessor(interface.postprocess, interface.statistics)(chunk, tensors)
    assert np.abs(ours - policy.predict_action_chunk(observation, noise=noise)).max() < 1e-5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_relative_action": True}, "decodes groups of relative actions"),
        ({"action_decode_transform": "libero"}, "turns the gripper's action into a sign, .* got libero"),
        ({"raw_stats": {"action": {}}}, "no statistics for all 4 action entries"),
    ],
)  # fmt: skip
def test_decoding_without_a_run_time_form_is_refused(
    copy: Path, config: dict[str, Any], message: str
) -> None:
    decode_by_groups(copy, **config)
    with pytest.raises(QuantVLAError, match=message):
        load_policy(copy)
