"""Identifying what a directory is, from JSON alone."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from quantvla.evaluate.arms import Contract, identify_arm, load_policy
from quantvla.runtime.errors import QuantVLAError

CONFIG = {
    "type": "smolvla",
    "input_features": {
        "observation.images.corner2": {"type": "VISUAL", "shape": [3, 128, 128]},
        "observation.state": {"type": "STATE", "shape": [4]},
    },
    "output_features": {"action": {"type": "ACTION", "shape": [4]}},
    "chunk_size": 16,
    "n_action_steps": 8,
    "max_action_dim": 32,
    "other": None,
}


def checkpoint(directory: Path, config: object = CONFIG) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").write_bytes(b"weights")
    return directory


def random_inputs(contract: Contract) -> tuple[dict[str, Any], npt.NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    observation = {
        **{key: rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for key in contract.cameras},
        contract.state_key: rng.standard_normal(contract.state_dim).astype(np.float32),
        contract.task_key: "open the door",
    }
    return observation, rng.standard_normal(contract.noise_shape, dtype=np.float32)


def test_a_checkpoint(tmp_path: Path) -> None:
    arm = identify_arm("float", checkpoint(tmp_path))
    assert (arm.name, arm.kind) == ("float", "checkpoint")
    contract = arm.contract
    assert contract.cameras == ("observation.images.corner2",)
    assert contract.noise_shape == (1, 16, 32)
    assert (contract.horizon, contract.execute, contract.state_dim) == (16, 8, 4)


def test_the_hash_follows_the_weights(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path)
    before = identify_arm("float", directory).sha256
    (directory / "model.safetensors").write_bytes(b"other")
    assert identify_arm("float", directory).sha256 != before


def test_neither(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("")
    message = r"neither a LeRobot checkpoint .* nor an engine .*, got readme.txt; give arm 'a'"
    with pytest.raises(QuantVLAError, match=message):
        identify_arm("a", tmp_path)
    with pytest.raises(QuantVLAError, match="got no such directory"):
        identify_arm("a", tmp_path / "absent")


def test_a_configuration_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(QuantVLAError, match=r"config.json: not the configuration of a chunk"):
        identify_arm("a", checkpoint(tmp_path, {"type": "tokenizer"}))


def test_no_state(tmp_path: Path) -> None:
    config = {**CONFIG, "input_features": {}}
    with pytest.raises(QuantVLAError, match=r"expected one state and one action .*, got 0 and 1"):
        identify_arm("a", checkpoint(tmp_path, config))


def test_a_damaged_manifest(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(QuantVLAError, match=r"manifest.json: is not a manifest"):
        identify_arm("a", tmp_path)


def test_a_quantized_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "quantized.json").write_text("{}")
    checkpoint(tmp_path / "policy")
    arm = identify_arm("a", tmp_path)
    assert arm.kind == "quantized" and arm.contract.horizon == 16
    (tmp_path / "policy" / "config.json").unlink()
    with pytest.raises(
        QuantVLAError, match=r"policy/config.json: not the configuration of a chunk"
    ):
        identify_arm("a", tmp_path)


def test_fewer_denoise_steps_are_the_same_for_engine_and_checkpoint(
    tiny_checkpoint: Path, tiny_float_engine: Path, tiny_quantized: Path
) -> None:
    """All three kinds run 4 steps instead of 10; the float ones give equal chunks, the integers others."""
    arms = [
        msgspec.structs.replace(identify_arm(path.name, path), denoise_steps=4)
        for path in (tiny_checkpoint, tiny_float_engine, tiny_quantized)
    ]
    observation, noise = random_inputs(arms[0].contract)
    policy, engine, integers = (
        load_policy(arm).predict_action_chunk(observation, noise=noise) for arm in arms
    )
    np.testing.assert_allclose(policy, engine, atol=1e-4)
    ten = load_policy(identify_arm("ten", tiny_float_engine))
    full = ten.predict_action_chunk(observation, noise=noise)
    assert np.abs(engine - full).max() > 1e-3
    assert 1e-4 < np.abs(integers - policy).max() < 1


def test_a_checkpoint_and_its_engine_have_one_contract(
    tiny_checkpoint: Path, tiny_float_engine: Path
) -> None:
    """What JSON says about both is what their policies do: chunks of that shape, equal for equal noise."""
    policy, engine = identify_arm("p", tiny_checkpoint), identify_arm("e", tiny_float_engine)
    assert policy.contract == engine.contract
    contract = policy.contract
    observation, noise = random_inputs(contract)
    chunks = [
        load_policy(a).predict_action_chunk(observation, noise=noise) for a in (policy, engine)
    ]
    assert chunks[0].shape == (contract.horizon, contract.action_dim)
    np.testing.assert_allclose(chunks[0], chunks[1], atol=1e-4)


def test_a_checkpoint_without_lerobot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arm = identify_arm("float", checkpoint(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(QuantVLAError, match=r"needs lerobot, which is not installed; run `pip"):
        load_policy(arm)
