"""A whole policy for a GPU target: planned, exported, built by tensorrt_rtx, its numbers confirmed by ONNX Runtime."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from random_observations import random_observation

from quantvla import staged
from quantvla.calib_sets import open_set
from quantvla.calibrate import collect_statistics
from quantvla.cli.target_options import GpuOptions, plan_for_gpu
from quantvla.export.graph_work import engine_work
from quantvla.export.source import SourcePolicy, load_source
from quantvla.export.tensorrt_engine import export_tensorrt, static_sites
from quantvla.roofline import estimate
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.manifest import check_files, read_manifest
from quantvla.runtime.sampler import euler_integrate
from quantvla.runtime.site_formats import read_formats
from quantvla.runtime.targets import BOARDS
from quantvla.runtime.tensorrt_build import BuildOptions, build_engine
from quantvla.site_tokens import count_site_tokens
from quantvla.target_plan import TargetPlan
from quantvla.verify import verify

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tiny_quantized: Path) -> SourcePolicy:
    return load_source(tiny_quantized)


@pytest.fixture(scope="module")
def plan(source: SourcePolicy) -> TargetPlan:
    return plan_for_gpu(source.loaded, source.plan, GpuOptions("rtx", None, "fp16", "int8"))


@pytest.fixture(scope="module")
def engine(
    source: SourcePolicy, plan: TargetPlan, tiny_set: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    directory = tmp_path_factory.mktemp("gpu")
    frames = open_set(tiny_set).part("calibration")
    statistics = collect_statistics(
        source.loaded, static_sites(plan), frames, seed=0, journal=directory / "journal",
        progress=lambda *_: None,
    )  # fmt: skip
    export_tensorrt(source, plan, statistics, directory / "engine")
    return directory / "engine"


def test_the_plan_covers_every_linear_that_is_read(source: SourcePolicy, plan: TargetPlan) -> None:
    assert {e.site for e in plan.entries} == {s.name for s in source.loaded.used_sites}
    assert source.plan is not None
    quantized = {entry.site for entry in source.plan.quantized}
    assert {e.site for e in plan.entries if e.format == "int8"} == quantized
    tokens = count_site_tokens(source.loaded)
    repeats = {stage.name: stage for stage in source.loaded.stages}
    chunk = source.loaded.interface.sampler.noise_shape[1]
    for site in source.loaded.used_sites:
        if site.stage == "denoise" and site.kind == "up_proj":
            assert tokens[site.name] == chunk and repeats["denoise"].repeat > 1


def test_the_engine_is_whole_and_says_what_runs_in_what(engine: Path, plan: TargetPlan) -> None:
    manifest, formats = read_manifest(engine), read_formats(engine)
    check_files(engine, manifest)
    assert {s.site: s.format for s in formats.sites} == {e.site: e.format for e in plan.entries}
    between = {s.name: s.dtype for s in manifest.stages[-1].inputs}
    assert between["keys"] == between["values"] == "float16" and between["x"] == "float32"


def test_tensorrt_keeps_the_format_of_every_linear(engine: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    record = build_engine(engine, BuildOptions(compute_capability=86))
    assert [plan.stage for plan in record.stages] == ["vision", "prefix", "denoise"]
    assert all(site.kept for plan in record.stages for site in plan.sites)


def test_tensorrt_runs_every_linear_on_a_4_bit_grid_weight_only(
    source: SourcePolicy, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    plan = plan_for_gpu(source.loaded, source.plan, GpuOptions("rtx", None, "fp16", "int4"))
    export_tensorrt(source, plan, {}, tmp_path / "engine")
    record = build_engine(tmp_path / "engine", BuildOptions(compute_capability=89))
    assert all(site.kept for stage in record.stages for site in stage.sites)
    assert {entry.format for entry in plan.entries} == {"fp16", "int4"}
    assert all("one of 32" in entry.reason for entry in plan.refused)


def test_4_bit_floats_are_built_for_blackwell_only_and_verified_by_definition(
    source: SourcePolicy, tiny_checkpoint: Path, tiny_float_engine: Path, tiny_set: Path, tmp_path: Path
) -> None:  # fmt: skip
    pytest.importorskip("tensorrt_rtx")
    plan = plan_for_gpu(source.loaded, source.plan, GpuOptions("rtx", "rtx-5090", "fp16", "nvfp4"))
    statistics = collect_statistics(
        source.loaded, static_sites(plan), open_set(tiny_set).part("calibration"), seed=0,
        journal=tmp_path / "journal", progress=lambda *_: None,
    )  # fmt: skip
    engine = tmp_path / "engine"
    export_tensorrt(source, plan, statistics, engine)
    formats = read_formats(engine)
    assert {site.format for site in formats.sites} == {"fp16", "nvfp4"}
    assert set(formats.compute_capabilities) == {120, 121}
    with pytest.raises(QuantVLAError, match="SM89"):
        build_engine(engine, BuildOptions(compute_capability=89))
    record = build_engine(engine, BuildOptions(compute_capability=120))
    assert all(site.kept for stage in record.stages for site in stage.sites)
    heldout = open_set(tiny_set).part("heldout")
    report = verify(engine, tiny_checkpoint, heldout, float_engine=tiny_float_engine)
    assert 0.001 < report.quantization.nrmse < 0.1
    assert 0.68 < 1 - report.integer_bytes / report.half_bytes < 0.72


def test_onnx_runtime_confirms_the_numbers_of_the_policy(
    engine: Path, source: SourcePolicy, tiny_size: Any
) -> None:
    loaded, manifest = source.loaded, read_manifest(engine)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    sessions = {s.name: ort.InferenceSession(engine / s.file, options) for s in manifest.stages}
    known: dict[str, Any] = staged.prepare(
        staged.make_preprocessor(loaded.interface), random_observation(tiny_size, 0)
    )
    reference = staged.run_context(loaded, known)
    *once, denoise = manifest.stages

    def run(name: str, tensors: dict[str, Any]) -> dict[str, Any]:
        names = [value.name for value in sessions[name].get_inputs()]
        outputs = [value.name for value in sessions[name].get_outputs()]
        found = sessions[name].run(outputs, {n: tensors[n] for n in names})
        return dict(zip(outputs, found, strict=True))

    for stage in once:
        known.update(run(stage.name, known))
    sampler = manifest.sampler
    noise = np.random.default_rng(0).standard_normal(sampler.noise_shape).astype(np.float32)

    def velocity(x: Any, t: float) -> Any:
        step = {sampler.state: x, sampler.time: np.array([t], np.float32)}
        outputs = run(denoise.name, {**known, **step})
        moved = x + np.float32(sampler.step) * outputs[sampler.velocity]
        np.testing.assert_allclose(outputs[f"{sampler.state}_next"], moved, atol=1e-6)
        return outputs[sampler.velocity]

    found = euler_integrate(velocity, noise, sampler.timesteps, sampler.step)
    expected = staged.sample(loaded, reference, noise)
    assert np.linalg.norm(found - expected) <= 0.05 * np.linalg.norm(expected - noise)


def test_verify_runs_the_graphs_of_a_gpu_engine_on_the_cpu(
    engine: Path, tiny_checkpoint: Path, tiny_float_engine: Path, tiny_set: Path, tmp_path: Path
) -> None:
    heldout = open_set(tiny_set).part("heldout")
    report = verify(engine, tiny_checkpoint, heldout, float_engine=tiny_float_engine)
    int8 = [site for site in read_formats(engine).sites if site.format == "int8"]
    assert report.passed and report.integer_sites == len(int8) > 0
    assert report.kernel.max_abs is None and report.chunk_limits_kept is None
    assert 0 < report.quantization.nrmse < 0.1
    assert 0.4 < 1 - report.integer_bytes / report.half_bytes < 0.5
    broken = Path(shutil.copytree(engine, tmp_path / "engine"))
    (broken / "vision.onnx").write_bytes(b"")
    with pytest.raises(QuantVLAError, match=r"vision\.onnx"):
        verify(broken, tiny_checkpoint, heldout, float_engine=tiny_float_engine)


def test_an_estimate_reads_the_graphs(engine: Path) -> None:
    manifest, formats = read_manifest(engine), read_formats(engine)
    works = engine_work(engine, manifest, formats)
    found = estimate("engine", works, BOARDS["rtx-4090"], "fp16")
    stored = sum(site.weight_bytes for site in formats.sites) / 1e6
    assert sum(stage.weight_mb for stage in found.stages) == pytest.approx(stored, rel=0.25)
    assert all(stage.total_ms > 0 for stage in found.stages)
