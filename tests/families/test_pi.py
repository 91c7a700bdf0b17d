"""What only pi0 and pi0.5 have: state as text, relative actions, adaRMS tables, openpi's names, the paper's 180 linears."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from lerobot.policies.common.vla_utils import resize_with_pad_torch
from lerobot.policies.pi05.modeling_pi05 import PI05Policy
from random_observations import random_observation
from safetensors.torch import load_file, save_file

from quantvla import staged
from quantvla.export.engine import export_engine
from quantvla.families import load_policy
from quantvla.families.pi import KINDS, describe_sites, empty_policy, widths_in_place
from quantvla.float_policy import FloatPolicy
from quantvla.layout import make_plan
from quantvla.recipe import read_recipe
from quantvla.runtime.control.limits import limits_from_manifest
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.guidance import ActionPrefix
from quantvla.runtime.manifest import read_manifest
from quantvla.runtime.policy import Policy
from quantvla.runtime.processing_steps import Tokenize
from quantvla.runtime.resize import resize_with_pad
from quantvla.runtime.text import StateWriter
from quantvla.testing import pi


@pytest.fixture(scope="module")
def relative(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pi0.5 whose actions are relative to the state, but for the gripper."""
    names = ["shoulder", "elbow", "wrist", "gripper.pos"]
    options = {"use_relative_actions": True, "action_feature_names": names}
    size = pi.PiSize(options=options)
    return pi.write_random_checkpoint("pi05", tmp_path_factory.mktemp("relative") / "pi05", size)


@pytest.fixture(scope="module")
def relative_engine(relative: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("relative_engine") / "engine"
    export_engine(relative, "cpu", output)
    return output


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (224, 224), (131, 77), (480, 640)])
def test_images_are_centred_as_lerobot_centres_them(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).random((3, *size), dtype=np.float32)
    expected = resize_with_pad_torch(torch.from_numpy(image)[None], 224, 224)[0].numpy()
    found = resize_with_pad(image, (224, 224), 0.0, around=True)
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_the_models_inputs_are_lerobots(tiny: Callable[[str], Path], kind: str) -> None:
    policy = FloatPolicy(load_policy(tiny(kind)))
    loaded = policy.loaded
    for seed, task in enumerate(("push the block", " push_the\nblock", "open")):
        observation = random_observation(pi.PiSize(), seed, task=task)
        found = staged.prepare(staged.make_preprocessor(loaded.interface), observation)
        batch = policy._before(policy._batch(observation))
        images, _ = loaded.policy._preprocess_images(batch)
        assert np.abs(found["images"] - torch.cat(images).numpy()).max() < 1e-5
        assert np.array_equal(found["tokens"], batch["observation.language.tokens"].numpy())
        mask = batch["observation.language.attention_mask"].numpy()
        assert np.array_equal(found["token_mask"], mask)
        if kind == "pi0":
            state = loaded.policy.prepare_state(batch).numpy()
            assert np.abs(found["state"] - state).max() < 1e-5


def test_states_outside_the_training_range_keep_their_numbers(tiny: Callable[[str], Path]) -> None:
    interface = load_policy(tiny("pi05")).interface
    (text,) = [s.prompt.state for s in interface.preprocess if isinstance(s, Tokenize)]
    statistics = interface.statistics["observation.state"]
    assert text is not None and statistics.q01 is not None and statistics.q99 is not None
    write = StateWriter(text, statistics)
    low, high = (np.array(end, np.float32) for end in (statistics.q01, statistics.q99))
    assert write(low - 1).split() == ["-1"] * 5
    assert write(high + 1).split() == ["255"] * 5
    assert write((low + high) / 2).split() == ["128"] * 5


def test_relative_actions_are_lerobots_and_leave_the_gripper(
    relative: Path, relative_engine: Path
) -> None:
    reference = FloatPolicy.from_pretrained(relative)
    observation = random_observation(pi.PiSize(), 3)
    with Policy.from_pretrained(relative_engine, threads=1) as policy:
        noise = policy.sample_noise(0)
        prediction = policy.predict(observation, noise=noise)
        expected = reference.predict_action_chunk(observation, noise=noise)
        assert np.abs(prediction.actions - expected).max() < 1e-4
        # The inverse, which continuing a chunk needs, takes the state off again.
        normalized = policy.postprocessor.normalize(prediction.actions, prediction.tensors)
        assert np.abs(normalized - prediction.normalized[0, :, :4]).max() < 1e-5
        with pytest.raises(
            QuantVLAError, match=r"relative to the state, and 'origin' .* not given"
        ):
            policy.postprocessor.normalize(prediction.actions)
        prefix = ActionPrefix(prediction.actions[:4], frozen=1)
        assert np.isfinite(policy.predict_action_chunk(observation, prefix=prefix)).all()
        moved = {**observation, "observation.state": observation["observation.state"] + 1}
        shift = policy.postprocessor(
            prediction.normalized, policy.prepare(moved)
        ) - policy.postprocessor(prediction.normalized, prediction.tensors)
        assert np.allclose(shift, [1, 1, 1, 0], atol=1e-5)


def test_statistics_of_displacements_give_no_limits(relative_engine: Path) -> None:
    with pytest.raises(QuantVLAError, match="action statistics give no range"):
        limits_from_manifest(read_manifest(relative_engine))


def test_relative_actions_need_their_step_and_a_state_as_long(
    relative: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(relative, tmp_path / "copy"))
    path = copy / "policy_preprocessor.json"
    pipeline = json.loads(path.read_text())
    steps = pipeline["steps"]
    pipeline["steps"] = [s for s in steps if s["registry_name"] != "relative_actions_processor"]
    path.write_text(json.dumps(pipeline))
    with pytest.raises(QuantVLAError, match="has no relative_actions_processor"):
        load_policy(copy)
    shutil.copy(relative / "policy_preprocessor.json", path)
    config = json.loads((copy / "config.json").read_text())
    config["input_features"]["observation.state"]["shape"] = [2]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        QuantVLAError, match="actions of 4 entries are relative to a state of fewer"
    ):
        load_policy(copy)


def test_modulation_is_tables_and_only_the_schedules_times_are_known(
    relative: Path, relative_engine: Path
) -> None:
    graph = onnx.load(relative_engine / "denoise.onnx", load_external_data=False).graph
    names = {tensor.name for tensor in graph.initializer}
    assert not any("dense" in name or "time_mlp" in name for name in names)
    assert {node.op_type for node in graph.node}.isdisjoint({"Sin", "Cos", "Sigmoid"})
    loaded = load_policy(relative)
    observation = random_observation(pi.PiSize(), 0)
    context = staged.run_context(
        loaded, staged.prepare(staged.make_preprocessor(loaded.interface), observation)
    )
    with Policy.from_pretrained(relative_engine, threads=1) as policy:
        assert policy.manifest.sampler.only_own_times
        tensors, x = policy.prepare(observation), policy.sample_noise(0)
        for t in policy.manifest.sampler.timesteps:
            ours, theirs = policy.velocity(tensors, x, t), staged.velocity(loaded, context, x, t)
            assert np.abs(ours - theirs).max() < 1e-5
        assert np.isfinite(policy.predict_action_chunk(observation, steps=5)).all()
        with pytest.raises(
            QuantVLAError, match=r"denoise time: .* got 0.75; use 1 or 2 or 5 or 10"
        ):
            policy.predict_action_chunk(observation, steps=4)
        with pytest.raises(QuantVLAError, match="denoise time: expected one of the 10"):
            policy.velocity(tensors, x, 0.33)


def test_files_with_openpis_names_load(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny("pi05"), tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    embedding = next(name for name in weights if name.endswith("embed_tokens.weight"))
    head = next(name for name in weights if name.endswith("paligemma.lm_head.weight"))
    weights[head] = weights.pop(embedding)
    stripped = {name.removeprefix("model."): value.clone() for name, value in weights.items()}
    save_file(stripped, copy / "model.safetensors")
    observation, noise = random_observation(pi.PiSize(), 0), np.zeros((1, 8, 32), np.float32)
    chunks = [
        FloatPolicy.from_pretrained(path).predict_normalized(observation, noise=noise)
        for path in (tiny("pi05"), copy)
    ]
    assert np.abs(chunks[0] - chunks[1]).max() < 1e-5  # other places in memory, other roundings


def test_lerobot_would_run_a_checkpoint_whose_weights_do_not_load(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """What the refusal guards against: the reference loader warns and returns random weights."""
    copy = Path(shutil.copytree(tiny("pi05"), tmp_path / "copy"))
    (copy / "model.safetensors").write_bytes(b"nothing")
    with widths_in_place(KINDS["pi05"], pi.PiSize().widths):
        assert isinstance(PI05Policy.from_pretrained(copy), PI05Policy)
    with pytest.raises(QuantVLAError, match="cannot be read as safetensors"):
        load_policy(copy)


def test_a_tokenizer_that_is_nowhere_is_named(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny("pi05"), tmp_path / "copy"))
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(
        QuantVLAError,
        match=r"tokenizer is not on this machine, got google/paligemma-3b-pt-224; copy .* `tokenizer/`",
    ):
        load_policy(copy)


def test_weights_of_something_else_are_named(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny("pi0"), tmp_path / "copy"))
    save_file({"weight": torch.zeros(2)}, copy / "model.safetensors")
    with pytest.raises(QuantVLAError, match="its weights are not those of a pi policy"):
        load_policy(copy)


def test_empty_cameras_are_reproduced(tmp_path: Path) -> None:
    size = replace(pi.PiSize(), options={"empty_cameras": 1})
    policy = FloatPolicy(load_policy(pi.write_random_checkpoint("pi0", tmp_path / "pi0", size)))
    observation, noise = random_observation(size, 0), policy.sample_noise(1)
    loaded = policy.loaded
    context = staged.run_context(
        loaded, staged.prepare(staged.make_preprocessor(loaded.interface), observation)
    )
    ours = staged.sample(loaded, context, noise)[0, :, :4]
    assert np.abs(ours - policy.predict_normalized(observation, noise=noise)).max() < 1e-5


def test_weights_stay_pages_of_the_file(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """A vocabulary of half a gigabyte, a hole in the file, costs no memory of its own to load."""
    copy = Path(shutil.copytree(tiny("pi0"), tmp_path / "copy"))
    path = copy / "model.safetensors"
    tensors = load_file(path)
    shapes = {name: list(value.shape) for name, value in tensors.items()}
    embedding = next(name for name in shapes if name.endswith("embed_tokens.weight"))
    shapes[embedding][0] = shapes[next(n for n in shapes if "paligemma.lm_head" in n)][0] = 1 << 20
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded)
    with path.open("r+b") as stream:
        stream.truncate(8 + len(encoded) + end)
    before = _anonymous_bytes()
    loaded = load_policy(copy)
    assert sum(value.nbytes for value in loaded.policy.parameters()) > 1 << 29
    assert _anonymous_bytes() - before < 1 << 27


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_the_papers_layout_is_180_linears_of_the_released_model(kind: str) -> None:
    """126 of the language model and 54 of the action head; the last layer's five that nothing reads are dropped."""
    size = pi.FULL_SIZE
    policy = empty_policy(KINDS[kind], pi.make_config(kind, size), size.widths)
    sites = describe_sites(policy, size.widths)
    plan = make_plan(sites, read_recipe("quantvla-w4a8"))
    parts = Counter(e.part for e in (*plan.quantized, *plan.dropped) if e.kind != "lm_head")
    assert parts == {"llm": 126, "expert": 54}
    assert len(plan.quantized) == 175
    assert plan.saving() > 0.7
