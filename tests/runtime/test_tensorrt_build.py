"""Engines built for real by tensorrt_rtx, which needs no GPU to build."""

from __future__ import annotations

import json
import re
import shutil
from collections import namedtuple
from pathlib import Path

import msgspec
import onnx
import pytest
import trt_engine
from click.testing import CliRunner

from quantvla.cli.build import build
from quantvla.cli.inspect import inspect
from quantvla.runtime import tensorrt_build, tensorrt_room
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.files import sha256_file
from quantvla.runtime.manifest import read_manifest
from quantvla.runtime.site_formats import FORMATS_FILE, encode_formats, read_formats
from quantvla.runtime.tensorrt_build import BuildOptions, build_engine
from quantvla.runtime.tensorrt_layers import layers_of_json, layers_of_listing, site_results
from quantvla.runtime.tensorrt_plans import (
    RECORD_FILE,
    Machine,
    plan_directory,
    read_record,
    require_plan,
    source_sha256,
)

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (extra tensorrt-rtx)")
ADA = BuildOptions(compute_capability=89)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    engine = trt_engine.write_trt_engine(tmp_path_factory.mktemp("trt") / "engine")
    build_engine(engine, ADA)
    return engine


@pytest.fixture
def engine(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "engine"))


@pytest.fixture
def unbuilt(engine: Path) -> Path:
    shutil.rmtree(engine / "plans")
    return engine


def machine(engine: Path) -> Machine:
    (directory,) = (engine / "plans").iterdir()
    record = msgspec.json.decode((directory / RECORD_FILE).read_bytes())
    return Machine(**record["machine"])


def test_every_linear_gets_its_planned_format(built: Path) -> None:
    record = read_record(built, machine(built))
    assert [plan.stage for plan in record.stages] == ["vision", "prefix", "denoise"]
    for plan in record.stages:
        (site,) = plan.sites
        assert (site.planned, site.ran) == (trt_engine.FORMATS[plan.stage],) * 2, site
        path = plan_directory(built, record.machine) / f"{plan.stage}.plan"
        assert path.stat().st_size == plan.plan_bytes
        assert sha256_file(path) == plan.plan_sha256


def test_a_killed_build_goes_on_with_the_stages_that_are_missing(
    unbuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, started = tensorrt_build._build_stage, []

    def until_prefix(*arguments: object) -> object:
        started.append(arguments[2].name)  # type: ignore[attr-defined]
        if started[-1] == "prefix" and len(started) == 2:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tensorrt_build, "_build_stage", until_prefix)
    with pytest.raises(KeyboardInterrupt):
        build_engine(unbuilt, ADA)
    build_engine(unbuilt, ADA)
    assert started == ["vision", "prefix", "prefix", "denoise"]
    build_engine(unbuilt, ADA)
    assert len(started) == 4


def test_progress_is_reported_to_its_end(unbuilt: Path) -> None:
    seen: dict[str, tuple[int, int]] = {}
    build_engine(
        unbuilt, ADA, progress=lambda what, done, total: seen.update({what: (done, total)})
    )
    assert any(what.startswith("denoise") for what in seen)
    assert all(done == total for done, total in seen.values())


def test_a_linear_in_another_format_fails_the_build(unbuilt: Path) -> None:
    formats = read_formats(unbuilt)
    sites = tuple(msgspec.structs.replace(site, format="int8") for site in formats.sites)
    changed = msgspec.structs.replace(formats, sites=sites)
    (unbuilt / FORMATS_FILE).write_bytes(encode_formats(changed))
    trt_engine.seal(unbuilt, trt_engine.manifest())
    with pytest.raises(
        QuantVLAError,
        match=r"stage prefix: 1 of 1 linears did not get their format, got llm.q_proj planned int8, runs int4;"
        r" pass --allow-fallback",
    ):
        build_engine(unbuilt, ADA)
    record = build_engine(unbuilt, BuildOptions(compute_capability=89, allow_fallback=True))
    assert [site.kept for plan in record.stages for site in plan.sites] == [True, False, False]


def test_the_parser_is_quoted_with_the_name_of_the_site(unbuilt: Path) -> None:
    model = onnx.load(unbuilt / "prefix.onnx")
    (product,) = [node for node in model.graph.node if node.op_type == "MatMul"]
    product.op_type = "MatMulInteger"
    onnx.save(model, unbuilt / "prefix.onnx")
    trt_engine.seal(unbuilt, trt_engine.manifest())
    with pytest.raises(
        QuantVLAError,
        match=r"stage prefix, node llm.q_proj \(MatMulInteger\): the ONNX parser of tensorrt_rtx .* refuses it.*"
        r"leave that site in float",
    ):
        build_engine(unbuilt, ADA)


def test_room_is_asked_for_before_anything_is_built(
    unbuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(tensorrt_room, "available_memory_bytes", lambda: 1 << 20)
    with pytest.raises(QuantVLAError, match=r"building needs about \d+ MiB of memory, got 1 MiB"):
        build_engine(unbuilt, BuildOptions(compute_capability=89, workspace_mib=4))
    monkeypatch.setattr(tensorrt_room.shutil, "disk_usage", lambda _: usage(0, 0, 1 << 10))
    with pytest.raises(QuantVLAError, match=r"MiB of disk, got 0 MiB free; free space"):
        build_engine(unbuilt, ADA)
    assert not (unbuilt / "plans").exists()


def test_a_gpu_the_engine_was_not_planned_for_is_refused(unbuilt: Path) -> None:
    for capability, remedy in (
        (75, r"export it again in formats that GPU has \(fp16\), with --board or --precision"),
        (87, "export it again with --target jetson-orin"),
        (90, "no target serves that GPU, see `quantvla targets`"),
    ):
        said = f"SM{capability}: this engine was planned for SM89, SM86, SM120; {remedy}"
        with pytest.raises(QuantVLAError, match=said):
            build_engine(unbuilt, BuildOptions(compute_capability=capability))


def test_a_changed_graph_is_refused(unbuilt: Path) -> None:
    with (unbuilt / "vision.onnx").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(QuantVLAError, match=r"vision.onnx: checksum mismatch"):
        build_engine(unbuilt, ADA)


def test_an_older_library_than_the_graphs_need_is_refused(
    unbuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tensorrt_build.load_library

    def old(name: str) -> object:
        library = real(name)
        return type(library)(library.name, "1.6.0", library.trt)

    monkeypatch.setattr(tensorrt_build, "load_library", old)
    with pytest.raises(QuantVLAError, match=r"written for tensorrt_rtx 1.7 or newer, got 1.6.0"):
        build_engine(unbuilt, ADA)


def test_plans_of_another_gpu_version_or_content_are_refused(engine: Path) -> None:
    files = read_manifest(engine).files
    here, source = machine(engine), source_sha256(engine, files, "prefix.onnx")
    path = require_plan(engine, here, "prefix", source)
    other = msgspec.structs.replace(here, compute_capability=86, gpu="any SM86")
    rebuild = r"; run: quantvla build .*engine"
    with pytest.raises(QuantVLAError, match=r"not built for sm86.*, got sm89" + ".*" + rebuild):
        require_plan(engine, other, "prefix", source)
    newer = msgspec.structs.replace(here, version="9.9")
    with pytest.raises(QuantVLAError, match=r"not built for sm89-.*-9.9, got sm89.*" + rebuild):
        require_plan(engine, newer, "prefix", source)
    with pytest.raises(QuantVLAError, match=r"built from another graph" + ".*" + rebuild):
        require_plan(engine, here, "prefix", "0" * 32)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(QuantVLAError, match=r"changed since it was built" + rebuild):
        require_plan(engine, here, "prefix", source)


def test_the_inspectors_json_and_the_listing_say_the_same() -> None:
    listing = (
        "Layers:\nName: site_myl0_1, LayerType: gemm, Inputs: [ { Name: a, Dimensions: [1,8,64], "
        "Strides: [512,64,1], Datatype: Int8, Format: (Linear) }], Constants: [ { Name: w, Datatype: Int8, Format: x }, "
        "{ Name: alpha, Datatype: Float, Format: x }], Outputs: [ { Name: y, Datatype: Half, Format: x }], "
        "TacticName: t, StreamId: 0, Metadata: [ONNX Layer: site][ONNX Layer: site.input_dq]"
    )
    as_json = (
        '{"Layers": [{"Name": "site_myl0_1", "LayerType": "gemm", '
        '"Inputs": [{"Name": "a", "Format/Datatype": "Row major linear INT8"}], '
        '"Constants": [{"Name": "w", "Datatype": "Int8"}, {"Name": "alpha", "Datatype": "Float"}], '
        '"Outputs": [{"Name": "y", "Datatype": "Half"}], "TacticName": "t", '
        '"Metadata": "[ONNX Layer: site][ONNX Layer: site.input_dq]"}], "Bindings": []}'
    )
    assert layers_of_listing(listing) == layers_of_json(as_json)
    site = trt_engine.SiteFormat("site", "vision", "site", "int8", 1, "")
    (result,) = site_results((site,), layers_of_json(as_json))
    assert result.ran == "int8" and result.layer == "site_myl0_1"
    (missing,) = site_results((site,), ())
    assert missing.ran == "not named" and not missing.kept


def test_inspect_shows_what_every_linear_runs_in(built: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(inspect, [str(built)], terminal_width=200)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if "llm.q_proj" in line]
    assert lines and re.search(r"prefix +│ int4 +│ int4 +│ \w+: \w+", lines[0])
    again = CliRunner().invoke(build, [str(built), "--compute-capability", "89", "--linears"])
    assert lines[0] in again.output.splitlines()
    assert "every linear got its planned format" in result.output
    found = json.loads(CliRunner().invoke(inspect, [str(built), "--json"]).stdout)
    (record,) = found["plans"]
    assert {s["site"] for stage in record["stages"] for s in stage["sites"]} == {
        site["site"] for site in found["planned"]["sites"]
    }
    fresh = trt_engine.write_trt_engine(tmp_path / "engine")
    assert "not built" not in CliRunner().invoke(inspect, [str(fresh)]).output
    partly = Path(shutil.copytree(built, tmp_path / "partly"))
    record_file = plan_directory(partly, machine(partly)) / RECORD_FILE
    kept = read_record(partly, machine(partly))
    kept = msgspec.structs.replace(kept, stages=kept.stages[:1])
    record_file.write_bytes(msgspec.json.encode(kept))
    assert "not built" in CliRunner().invoke(inspect, [str(partly)]).output
