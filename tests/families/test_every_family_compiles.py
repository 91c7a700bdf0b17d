"""What holds for every family from quantization to the robot: folds, kill and resume, export, verification."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from random_observations import random_observation

from quantvla.calib_sets import CalibrationSet, open_set
from quantvla.checkpoint import load_quantized, read_added, read_card
from quantvla.export.engine import export_engine
from quantvla.export.integers import integer_sites
from quantvla.families import load_policy
from quantvla.float_policy import FloatPolicy
from quantvla.passes import TuneScales
from quantvla.quantize import quantize
from quantvla.quantized_linear import QuantizedLinear
from quantvla.recipe import read_recipe
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.files import sha256_tree
from quantvla.runtime.manifest import read_manifest
from quantvla.runtime.policy import Policy
from quantvla.verify import verify

METHOD = read_recipe("quantvla-w4a8")


def test_every_fold_leaves_the_float_policy_what_it_was(quantized: Path) -> None:
    reports = {report.kind: report for report in read_card(quantized).reports}
    for kind in ("smooth", "fold_norms", "rotate", "permute"):
        found = reports[kind].equivalence
        assert reports[kind].folds > 0 and found is not None
        assert found.max_abs < 1e-4, kind
    assert reports["atm"].factors and reports["ohb"].factors


def test_what_does_not_fold_is_said(checkpoint: Path, quantized: Path) -> None:
    notes = {report.kind: report.notes for report in read_card(quantized).reports}
    structure = load_policy(checkpoint).structure
    for stream in structure.streams:
        assert bool(stream.obstacle) == any(
            f"stream {stream.name!r} is not rotated: {stream.obstacle}" in note
            for note in notes["rotate"]
        )
    modulated = [norm for norm in structure.norms if norm.modulation]
    assert bool(modulated) == any(f"{len(modulated)} norms" in n for n in notes["fold_norms"])


def test_norms_without_a_gain_get_one_where_integers_read_them(
    checkpoint: Path, quantized: Path
) -> None:
    loaded, planned = load_policy(checkpoint), read_card(quantized).plan.quantized
    sites = {entry.site for entry in planned}
    bare = [
        norm.name
        for norm in loaded.structure.norms
        if norm.modulation is None and sites & set(norm.readers)
        and loaded.policy.get_submodule(norm.name).weight is None
    ]  # fmt: skip
    added = read_added(quantized)
    assert bool(bare) == any(name.removesuffix(".weight") in bare for name in added)


class StopError(Exception):
    pass


@pytest.mark.parametrize("what", ["rounding weights", "attention output"])  # fmt: skip
def test_a_run_stopped_anywhere_continues_to_the_same_bytes(
    what: str, checkpoint: Path, frames: CalibrationSet, quantized: Path, tmp_path: Path
) -> None:
    seen = Counter[str]()

    def stop(now: str, _done: int, _total: int) -> None:
        seen[now.split(",")[0]] += 1
        if seen[what] > 1:
            raise StopError

    with pytest.raises(StopError):
        quantize(checkpoint, frames, METHOD, tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    quantize(checkpoint, frames, METHOD, tmp_path / "out")
    assert sha256_tree(tmp_path / "out") == sha256_tree(quantized)


def test_second_order_rounding_is_closer_than_nearest(
    checkpoint: Path, tiny_set: Path, tmp_path: Path
) -> None:
    errors, frames = {}, open_set(tiny_set)
    for recipe in ("gptq-w4a8", "rtn-w4a8"):
        result = quantize(checkpoint, frames, read_recipe(recipe), tmp_path / recipe)
        sites = [site for report in result.reports for site in report.sites]
        assert {site.site for site in sites} == {entry.site for entry in result.plan.quantized}
        errors[recipe] = np.mean([site.relative_output_error for site in sites])
    assert errors["gptq-w4a8"] < errors["rtn-w4a8"]


def test_scales_are_tuned_through_every_stage(
    checkpoint: Path, tiny_set: Path, tmp_path: Path
) -> None:
    base = read_recipe("rtn-w4a8")
    tuning = msgspec.structs.replace(
        base, name="tuned", passes=(*base.passes, TuneScales(steps=2, rate=1e-2, batch=1))
    )
    frames = open_set(tiny_set)
    for recipe in (base, tuning):
        quantize(checkpoint, frames, recipe, tmp_path / recipe.name)
    before, after = (
        dict(load_quantized(tmp_path / recipe.name)[0].policy.named_modules())
        for recipe in (base, tuning)
    )
    for entry in read_card(tmp_path / "tuned").plan.quantized:
        old, new = before[entry.site], after[entry.site]
        assert isinstance(old, QuantizedLinear) and isinstance(new, QuantizedLinear)
        assert torch.equal(old.quantized.codes, new.quantized.codes)
        assert not torch.equal(old.quantized.scales, new.quantized.scales), entry.site


def test_a_quantized_checkpoint_carries_all_that_loading_it_needs(
    quantized: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    loaded, card = load_quantized(quantized)
    integers = [m for m in loaded.policy.modules() if isinstance(m, QuantizedLinear)]
    assert len(integers) == len(card.plan.quantized) > 0
    assert loaded.interface.files


def test_the_float_engine_does_what_lerobot_does(
    checkpoint: Path, float_engine: Path, size: Any
) -> None:
    """The whole sampling loop, from raw images and state to actions in physical units."""
    reference = FloatPolicy.from_pretrained(checkpoint)
    with Policy.from_pretrained(float_engine, threads=1) as policy:
        for index, task in enumerate(("Push it!", "open the door", "push_the red\nblock ")):
            observation = random_observation(size, index, task=task)
            noise = policy.sample_noise(index)
            ours = policy.predict_action_chunk(observation, noise=noise)
            theirs = reference.predict_action_chunk(observation, noise=noise)
            assert ours.shape == (size.chunk, size.action_dim)
            assert np.abs(ours - theirs).max() < 1e-5


@pytest.mark.parametrize("which", ["float_engine", "integer_engine"])
def test_all_steps_in_one_call_are_the_steps_one_by_one(
    which: str, size: Any, request: pytest.FixtureRequest
) -> None:
    observation = random_observation(size, 1)
    with Policy.from_pretrained(request.getfixturevalue(which), threads=1) as policy:
        assert policy.manifest.loop is not None
        for seed in range(3):
            steps = policy.predict(observation, seed=seed).actions
            assert np.array_equal(policy.predict_action_chunk(observation, seed=seed), steps)


def test_tables_over_the_time_stand_where_weights_only_see_the_time(
    checkpoint: Path, float_engine: Path
) -> None:
    modulated = any(site.role == "modulation" for site in load_policy(checkpoint).sites)
    assert read_manifest(float_engine).sampler.only_own_times == modulated


def test_every_planned_site_is_one_integer_kernel(quantized: Path, integer_engine: Path) -> None:
    found = Counter(
        site.site for site in integer_sites(integer_engine, read_manifest(integer_engine))
    )
    assert found == Counter(entry.site for entry in read_card(quantized).plan.quantized)


def test_verification_passes(
    checkpoint: Path, float_engine: Path, integer_engine: Path, quantized: Path,
    heldout: CalibrationSet,
) -> None:  # fmt: skip
    report = verify(
        integer_engine, checkpoint, heldout, float_engine=float_engine, quantized=quantized
    )
    assert report.passed, report
    assert report.parity.max_abs < 1e-5 < report.quantization.max_abs


def test_a_missing_camera_and_noise_of_another_chunk_are_refused(
    integer_engine: Path, size: Any
) -> None:
    observation = random_observation(size, 0)
    with Policy.from_pretrained(integer_engine, threads=1) as policy:
        shape = policy.manifest.sampler.noise_shape
        with pytest.raises(QuantVLAError, match=r"noise: expected floats of shape"):
            policy.predict_action_chunk(
                observation, noise=np.zeros((1, shape[1] + 1, shape[2]), np.float32)
            )
        del observation["observation.images.wrist"]
        with pytest.raises(
            QuantVLAError, match=r"'observation\.images\.wrist': camera image is missing"
        ):
            policy.predict_action_chunk(observation)


def test_a_set_without_one_of_the_cameras_is_refused(
    checkpoint: Path, size: Any, tmp_path: Path
) -> None:
    (tmp_path / "set").mkdir()
    for index in range(4):
        observation = random_observation(size, index)
        del observation["observation.images.wrist"]
        np.savez(tmp_path / "set" / f"{index}.npz", **observation, episode=index, frame=0)
    with pytest.raises(QuantVLAError, match=r"observation\.images\.wrist"):
        quantize(checkpoint, open_set(tmp_path / "set"), METHOD, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_does_not_load_leaves_no_engine(copy: Path, tmp_path: Path) -> None:
    (copy / "policy_postprocessor.json").unlink()
    with pytest.raises(QuantVLAError, match=r"has no policy_postprocessor.json"):
        export_engine(copy, "cpu", tmp_path / "engine")
    assert not (tmp_path / "engine").exists()
