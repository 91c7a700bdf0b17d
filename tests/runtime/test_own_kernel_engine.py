"""An engine with graphs of the project's own operators: the same policy with and without the library."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from quantvla.cli.inspect import inspect
from quantvla.export.engine import export_engine
from quantvla.export.integers import IntegerSite, integer_sites
from quantvla.runtime import kernels
from quantvla.runtime.bench import bench
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.manifest import read_manifest
from quantvla.runtime.policy import Policy

needs_library = pytest.mark.skipif(
    kernels.available().library is None, reason="own kernels are not built"
)


def chunk(engine: Path) -> np.ndarray:
    with Policy.from_pretrained(engine, threads=2) as policy:
        return policy.predict(policy.blank_observation(), seed=0).normalized


def sites(engine: Path) -> list[IntegerSite]:
    return sorted(integer_sites(engine, read_manifest(engine)), key=lambda found: found.site)


def test_integer_stages_have_both_graphs_on_one_file_of_weights(tiny_integer_engine: Path) -> None:
    manifest = read_manifest(tiny_integer_engine)
    named = {stage.name: stage.native for stage in manifest.stages}
    assert named["prefix"] == "prefix.native.onnx" and named["denoise"] == "denoise.native.onnx"
    assert named["vision"] == ""  # nothing quantized there
    for stage in manifest.stages:
        if stage.native:
            graph = (tiny_integer_engine / stage.native).stat().st_size
            assert graph < (tiny_integer_engine / f"{stage.file}.data").stat().st_size
            assert not (tiny_integer_engine / f"{stage.native}.data").exists()


@needs_library
def test_both_graphs_are_the_same_policy(
    tiny_integer_engine: Path, tiny_float_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = chunk(tiny_integer_engine)
    weights = sites(tiny_integer_engine)
    monkeypatch.setenv(kernels.SWITCH, "off")
    with pytest.warns(
        RuntimeWarning,
        match="integer linears run on ONNX Runtime's .*switched off by QUANTVLA_KERNELS",
    ):
        stock = chunk(tiny_integer_engine)
    difference, error = np.abs(own - stock).max(), np.abs(stock - chunk(tiny_float_engine)).max()
    assert 0 < difference < 0.5 * error  # bfloat16 attention against what quantization costs
    for mine, theirs in zip(weights, sites(tiny_integer_engine), strict=True):
        assert mine.site == theirs.site and mine.stored_bytes == theirs.stored_bytes
        assert (mine.weight.codes == theirs.weight.codes).all()
        assert (mine.weight.scales == theirs.weight.scales).all()


@needs_library
def test_attention_in_float_is_that_of_other_processors(
    wide_heads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_run = chunk(wide_heads.engine)
    with kernels.float_attention():
        in_float = chunk(wide_heads.engine)
    assert np.array_equal(chunk(wide_heads.engine), as_run)
    if kernels.BFLOAT16 not in kernels.available().attention:
        assert np.array_equal(in_float, as_run)
        return
    monkeypatch.setenv(kernels.SWITCH, "off")
    with pytest.warns(RuntimeWarning, match="integer linears run on ONNX Runtime's"):
        stock = chunk(wide_heads.engine)
    assert 0 < np.abs(in_float - stock).max() < 0.1 * np.abs(as_run - stock).max()


@needs_library
def test_bench_names_the_kernels(
    tiny_integer_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench(tiny_integer_engine, repeats=1, warmup=0).versions["kernels"].startswith("own, ")
    monkeypatch.setenv(kernels.SWITCH, "off")
    named = bench(tiny_integer_engine, repeats=1, warmup=0).versions["kernels"]
    assert named == "ONNX Runtime's (own kernels switched off by QUANTVLA_KERNELS)"


@needs_library
def test_inspect_shows_the_graphs_that_run_and_says_why(
    tiny_integer_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown() -> str:
        result = CliRunner().invoke(inspect, [str(tiny_integer_engine)])
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    def operators() -> set[str]:
        result = CliRunner().invoke(inspect, [str(tiny_integer_engine), "--json"])
        return {name for found in json.loads(result.stdout)["operators"].values() for name in found}

    assert "integer linears run on own, " in shown() and "IntegerLinear" in operators()
    monkeypatch.setenv(kernels.SWITCH, "off")
    assert "ONNX Runtime's (own kernels switched off" in shown()
    assert "MatMulNBits" in operators() and "IntegerLinear" not in operators()


@needs_library
def test_a_weight_that_does_not_fit_is_refused(tiny_integer_engine: Path, tmp_path: Path) -> None:
    import onnx

    engine = Path(shutil.copytree(tiny_integer_engine, tmp_path / "engine"))
    model = onnx.load(engine / "prefix.native.onnx", load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "IntegerLinear")
    next(attribute for attribute in node.attribute if attribute.name == "block").i = 8
    onnx.save(model, engine / "prefix.native.onnx")
    with (
        Policy.from_pretrained(engine, verify_checksums=False) as policy,
        pytest.raises(Exception, match="IntegerLinear: scales do not fit the weight"),
    ):
        policy.warm_up()


def test_an_export_without_own_kernels_has_stock_graphs_only(
    tiny_quantized: Path, tmp_path: Path
) -> None:
    manifest = export_engine(tiny_quantized, "cpu", tmp_path / "stock", kernels="onnxruntime")
    assert not any(stage.native for stage in manifest.stages)
    assert not list((tmp_path / "stock").glob("*.native.onnx"))


def test_a_native_graph_that_is_not_listed_is_refused(
    tiny_integer_engine: Path, tmp_path: Path
) -> None:
    engine = Path(shutil.copytree(tiny_integer_engine, tmp_path / "engine"))
    (engine / "prefix.native.onnx").unlink()
    with pytest.raises(QuantVLAError, match="listed in the manifest but missing"):
        Policy.from_pretrained(engine)
