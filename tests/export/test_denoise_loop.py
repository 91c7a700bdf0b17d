"""The graph of all denoise steps: when it is loaded, what runs beside it, and that a wrong one is noticed."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from msgspec import structs

from quantvla.calib_sets import open_set
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.files import sha256_file
from quantvla.runtime.kernels import graph_file
from quantvla.runtime.manifest import MANIFEST_FILE, encode_manifest, read_manifest
from quantvla.runtime.policy import Policy
from quantvla.verify import verify


@pytest.fixture
def engine(tiny_float_engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_float_engine, tmp_path / "engine"))


def loaded(policy: Policy) -> set[str]:
    sessions = policy._engine._sessions
    assert sessions is not None
    return set(sessions)


def test_a_single_step_is_loaded_when_something_needs_one(tiny_float_engine: Path) -> None:
    with Policy.from_pretrained(tiny_float_engine, threads=1) as policy:
        whole = policy.predict_action_chunk(policy.blank_observation(), seed=1)
        assert loaded(policy) == {"vision", "prefix", "denoise_loop"}
        fewer = policy.predict_action_chunk(policy.blank_observation(), seed=1, steps=5)
        assert loaded(policy) == {"vision", "prefix", "denoise_loop", "denoise"}
        assert not np.array_equal(fewer, whole)
    with Policy.from_pretrained(tiny_float_engine, threads=1) as policy:
        policy.load_step()
        assert "denoise" in loaded(policy)


def test_the_time_of_a_step_is_its_share_of_the_loop(tiny_float_engine: Path) -> None:
    with Policy.from_pretrained(tiny_float_engine, threads=1) as policy:
        with policy.timing() as durations:
            policy.predict_action_chunk(policy.blank_observation())
        steps = durations["denoise"]
        assert len(steps) == len(policy.manifest.sampler.timesteps) and len(set(steps)) == 1
        assert 0 < sum(steps) < durations["chunk"][0]


def test_the_loop_stores_no_weights_of_its_own(tiny_integer_engine: Path) -> None:
    manifest = read_manifest(tiny_integer_engine)
    assert manifest.loop is not None
    files = {path.name for path in tiny_integer_engine.glob("*.data")}
    assert files == {f"{stage.file}.data" for stage in manifest.stages}
    for step, loop in (
        (manifest.stages[-1].file, manifest.loop.file),
        (manifest.stages[-1].native, manifest.loop.native),
    ):
        sizes = [(tiny_integer_engine / name).stat().st_size for name in (step, loop)]
        assert sizes[1] < sizes[0] + 4096


def test_verify_notices_a_loop_that_is_not_the_steps(
    engine: Path, tiny_checkpoint: Path, tiny_set: Path
) -> None:
    manifest = read_manifest(engine)
    assert manifest.loop is not None
    path = engine / graph_file(manifest.loop)
    model = onnx.load(path, load_external_data=False)
    sizes = next(t for t in model.graph.initializer if t.name == "loop.sizes")
    longer = onnx.numpy_helper.to_array(sizes) * np.float32(1.01)
    sizes.CopyFrom(onnx.numpy_helper.from_array(longer, sizes.name))
    onnx.save(model, path)
    files = {name: sha256_file(engine / name) for name in manifest.files}
    changed = structs.replace(manifest, files=files)
    (engine / MANIFEST_FILE).write_bytes(encode_manifest(changed))
    report = verify(engine, tiny_checkpoint, open_set(tiny_set).part("heldout"))
    assert report.failed == ("loop",) and report.loop is not None and report.loop > 1e-3


def test_a_missing_loop_is_named(engine: Path) -> None:
    (engine / "denoise_loop.onnx").unlink()
    with pytest.raises(QuantVLAError, match=r"denoise_loop\.onnx: listed in the manifest but miss"):
        Policy.from_pretrained(engine)
