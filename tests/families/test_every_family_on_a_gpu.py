"""What holds for every family on the targets that TensorRT serves: planned, exported, built, and its numbers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from random_observations import random_observation

from quantvla import staged
from quantvla.calib_sets import CalibrationSet
from quantvla.calibrate import collect_statistics
from quantvla.cli.target_options import GpuOptions, plan_for_gpu
from quantvla.export.marked_graphs import MarkedGraphs, marked_graphs
from quantvla.export.source import SourcePolicy
from quantvla.export.tensorrt_engine import export_tensorrt, static_sites
from quantvla.families import load_policy
from quantvla.runtime.backend import UNFUSED
from quantvla.runtime.manifest import MANIFEST_FILE, encode_manifest, read_manifest
from quantvla.runtime.policy import Policy
from quantvla.runtime.site_formats import read_formats
from quantvla.runtime.tensorrt_build import BuildOptions, build_engine
from quantvla.statistics import SiteStatistics
from quantvla.target_plan import TABLE, TargetPlan
from quantvla.testing.rounded import rounded_source

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def source(checkpoint: Path) -> SourcePolicy:
    return rounded_source(load_policy(checkpoint))


@pytest.fixture(scope="session")
def graphs(source: SourcePolicy) -> MarkedGraphs:
    return marked_graphs(source.loaded, lambda *_: None)


@pytest.fixture(scope="session")
def plan(source: SourcePolicy) -> TargetPlan:
    return plan_for_gpu(source.loaded, source.plan, GpuOptions("rtx", None, "fp16", "int8"))


@pytest.fixture(scope="session")
def statistics(
    source: SourcePolicy, plan: TargetPlan, frames: CalibrationSet, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, SiteStatistics]:  # fmt: skip
    return collect_statistics(
        source.loaded, static_sites(plan), frames, seed=0, journal=tmp_path_factory.mktemp("journal"),
        progress=lambda *_: None,
    )  # fmt: skip


@pytest.fixture(scope="session")
def engine(
    source: SourcePolicy, plan: TargetPlan, graphs: MarkedGraphs, statistics: dict[str, SiteStatistics],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    output = tmp_path_factory.mktemp("gpu") / "engine"
    export_tensorrt(source, plan, statistics, output, graphs=graphs)
    return output


def test_linears_of_the_time_alone_are_tables_and_all_others_stay(
    source: SourcePolicy, plan: TargetPlan, engine: Path
) -> None:
    tables = {entry.site for entry in plan.entries if entry.format == TABLE}
    modulation = {site.name for site in source.loaded.used_sites if site.role == "modulation"}
    assert modulation <= tables and bool(modulation) == bool(tables)
    written = {site.site for site in read_formats(engine).sites}
    assert written == {entry.site for entry in plan.entries} - tables
    assert read_manifest(engine).sampler.only_own_times == bool(tables)


def test_every_stage_builds_and_every_linear_gets_its_format(
    source: SourcePolicy, engine: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    record = build_engine(engine, BuildOptions(compute_capability=86))
    assert [plan.stage for plan in record.stages] == [s.name for s in source.loaded.stages]
    results = [site for stage in record.stages for site in stage.sites]
    assert all(result.kept for result in results)
    assert "int8" in {result.ran for result in results}


def test_the_graphs_compute_what_the_policy_does(
    source: SourcePolicy, engine: Path, size: Any, tmp_path: Path
) -> None:
    """The whole sampling loop, from raw images, in ONNX Runtime; weights are of the same 4-bit grid."""
    copy = Path(shutil.copytree(engine, tmp_path / "engine"))
    runnable = msgspec.structs.replace(read_manifest(copy), target=UNFUSED)
    (copy / MANIFEST_FILE).write_bytes(encode_manifest(runnable))
    loaded = source.loaded
    with Policy.from_pretrained(copy, threads=1) as policy:
        for index in range(2):
            observation, noise = random_observation(size, index), policy.sample_noise(index)
            ours = policy.predict(observation, noise=noise).normalized
            context = staged.run_context(loaded, staged.prepare(policy.preprocessor, observation))
            theirs = staged.sample(loaded, context, noise)
            assert 0 < np.linalg.norm(ours - theirs) < 0.05 * np.linalg.norm(theirs - noise)


@pytest.mark.parametrize("target", ["jetson-orin", "jetson-thor"])
def test_the_jetsons_read_the_graphs(
    target: str, source: SourcePolicy, graphs: MarkedGraphs, statistics: dict[str, SiteStatistics], tmp_path: Path
) -> None:  # fmt: skip
    plan = plan_for_gpu(source.loaded, source.plan, GpuOptions(target, None, "fp16", "auto"))
    manifest = export_tensorrt(source, plan, statistics, tmp_path / "engine", graphs=graphs)
    assert manifest.target == target
    formats = {site.format for site in read_formats(tmp_path / "engine").sites}
    assert formats - {"fp16"}, "no linear has a format of its own"
