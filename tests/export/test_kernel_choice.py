"""Integer linears exported as what a machine was measured to be fastest with."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from quantvla.cli.export import export as export_command
from quantvla.cli.inspect import inspect
from quantvla.cli.main import main
from quantvla.cli.profile import profile as profile_command
from quantvla.export.engine import export_engine
from quantvla.export.kernel_choice import exact_operators
from quantvla.export.source import load_source
from quantvla.latency_table import TABLE_VERSION, Kernel, KernelTime, LatencyTable, TableFile
from quantvla.mixed.choose import planned_kernels
from quantvla.mixed.profile import this_machine
from quantvla.runtime import kernels
from quantvla.runtime.manifest import Manifest, read_manifest
from quantvla.runtime.policy import Policy

OWN, STOCK = "IntegerLinear", "MatMulNBits"
needs_library = pytest.mark.skipif(
    kernels.available().library is None, reason="own kernels are not built"
)


@pytest.fixture(scope="module")
def linears(tiny_quantized: Path) -> list[Kernel]:
    return planned_kernels(load_source(tiny_quantized).loaded)


def table(times: dict[Kernel, dict[str, float]]) -> LatencyTable:
    entries = tuple(KernelTime(kernel, found, 3) for kernel, found in times.items())
    return LatencyTable(version=TABLE_VERSION, machine=this_machine("cpu", 1), times=entries)


def operators(directory: Path, stage: int) -> Counter[str]:
    graph = read_manifest(directory).stages[stage].native
    model = onnx.load(directory / graph, load_external_data=False)
    return Counter(node.op_type for node in model.graph.node if node.op_type in (OWN, STOCK))


def chosen(manifest: Manifest) -> dict[str, tuple[str, str]]:
    assert manifest.kernels is not None
    return {site.site: (site.operator, site.reason) for site in manifest.kernels.sites}


@pytest.mark.parametrize(
    ("bits", "inputs", "block", "out", "own", "expected"),
    [
        (4, "int8_block", 32, 64, True, (OWN, STOCK)),
        (8, "int8_block", 240, 64, True, (OWN,)),  # the stock operator knows powers of two only
        (8, "int8_block", 240, 64, False, (STOCK,)),
        (4, "int8_block", 32, 60, True, (STOCK,)),  # no whole panels of 16
        (4, "float", 32, 64, True, (STOCK,)),
        (8, "uint8_tensor", 96, 64, True, ("DynamicQuantizeMatMul",)),
    ],
)
def test_only_operators_that_compute_the_format_are_candidates(
    bits: int, inputs: str, block: int, out: int, own: bool, expected: tuple[str, ...]
) -> None:
    assert exact_operators(bits, inputs, block, out, own=own) == expected  # type: ignore[arg-type]


def test_each_site_gets_the_fastest_operator_and_the_policy_stays_the_same(
    tiny_quantized: Path, tiny_integer_engine: Path, linears: list[Kernel], tmp_path: Path
) -> None:
    wide = {
        kernel for kernel in linears if kernel.out_features == max(k.out_features for k in linears)
    }
    assert wide and wide != set(linears)
    times = {k: {OWN: 10.0, STOCK: 5.0 if k in wide else 9.8} for k in linears}
    engine = tmp_path / "engine"
    manifest = export_engine(tiny_quantized, "cpu", engine, profile=table(times))
    assert manifest == read_manifest(engine)
    assert (
        manifest.kernels is not None
        and manifest.kernels.profile == this_machine("cpu", 1).describe()
    )
    for site in manifest.kernels.sites:
        fast = site.out_features == next(iter(wide)).out_features
        assert site.operator == (STOCK if fast else OWN), site
        assert site.median_us == {OWN: 10.0, STOCK: 5.0 if fast else 9.8}
        assert site.reason == (
            "measured to be the fastest" if fast else f"default: {STOCK} is less than 5% faster"
        )
    for index, stage in enumerate(manifest.stages):
        sites = [site for site in manifest.kernels.sites if site.stage == stage.name]
        if sites:
            assert operators(engine, index) == Counter(site.operator for site in sites)
    with (
        Policy.from_pretrained(engine) as policy,
        Policy.from_pretrained(tiny_integer_engine) as other,
    ):
        obs = policy.blank_observation()
        mine, theirs = (p.predict(obs, seed=0).normalized for p in (policy, other))
    assert np.abs(mine - theirs).max() < 0.02 * np.abs(theirs).max()
    again = export_engine(tiny_quantized, "cpu", tmp_path / "again", profile=table(times))
    assert again == manifest  # the checksums of all files among it


def test_without_a_measurement_the_export_is_the_default_one(
    tiny_quantized: Path, linears: list[Kernel], tmp_path: Path
) -> None:
    own = export_engine(tiny_quantized, "cpu", tmp_path / "own", kernels="own")
    none = export_engine(tiny_quantized, "cpu", tmp_path / "none")
    partly = {linears[0]: {OWN: 1.0, STOCK: 2.0}, linears[1]: {OWN: 1.0}}
    some = export_engine(tiny_quantized, "cpu", tmp_path / "some", profile=table(partly))
    assert own.files == none.files == some.files
    assert set(chosen(own).values()) == {(OWN, "asked for: own")}
    assert set(chosen(none).values()) == {(OWN, "no profile of this machine: default")}
    assert set(chosen(some).values()) == {
        (OWN, "measured to be the fastest"), (OWN, "not in the profile of this machine: default"),
    }  # fmt: skip


def test_onnxruntime_can_be_asked_for(tiny_quantized: Path, tmp_path: Path) -> None:
    manifest = export_engine(tiny_quantized, "cpu", tmp_path / "engine", kernels="onnxruntime")
    assert set(chosen(manifest).values()) == {(STOCK, "asked for: onnxruntime")}


def test_a_float_engine_has_no_choices(tiny_float_engine: Path) -> None:
    assert read_manifest(tiny_float_engine).kernels is None


@needs_library
def test_profile_export_and_inspect_work_together(tiny_quantized: Path, tmp_path: Path) -> None:
    where = ["--cache", str(tmp_path / "cache"), "--threads", "1"]
    measured = CliRunner().invoke(
        profile_command, ["--policy.path", str(tiny_quantized), "--rounds", "3", "--json", *where]
    )
    assert measured.exit_code == 0, measured.output
    times = json.loads(measured.stdout)["times"]
    assert times and all(time["median_us"].keys() == {OWN, STOCK} for time in times)
    engine = tmp_path / "engine"
    result = CliRunner().invoke(export_command, [str(tiny_quantized), "-o", str(engine), *where])
    assert result.exit_code == 0, result.output
    manifest = read_manifest(engine)
    assert manifest.kernels is not None and manifest.kernels.sites
    for site in manifest.kernels.sites:
        assert site.median_us.keys() == {OWN, STOCK}
        assert "profile" not in site.reason
    shown = CliRunner().invoke(inspect, [str(engine)], env={"COLUMNS": "400"})
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.output.split())
    assert f"measured on {manifest.kernels.profile}" in text
    assert f"{OWN} {manifest.kernels.sites[0].median_us[OWN]:.1f}" in text
    as_json = json.loads(CliRunner().invoke(inspect, [str(engine), "--json"]).stdout)
    assert as_json["manifest"]["kernels"]["sites"][0]["median_us"]


def test_a_table_of_another_machine_or_a_damaged_one_is_refused(
    tiny_quantized: Path, linears: list[Kernel], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = TableFile(tmp_path / "cache", this_machine("cpu", 1))
    other = msgspec.structs.replace(this_machine("cpu", 1), processor="Another CPU")
    command = [
        "export", str(tiny_quantized), "-o", str(tmp_path / "engine"), "--threads", "1",
        "--cache", str(tmp_path / "cache"),
    ]  # fmt: skip
    theirs = msgspec.structs.replace(table({linears[0]: {OWN: 2.0, STOCK: 1.0}}), machine=other)
    file.write(theirs)
    for content, message in (
        (file.path.read_bytes(), "measured on another machine than this one"),
        (b"{", "not a latency table of this version"),
    ):
        file.path.write_bytes(content)
        with pytest.raises(SystemExit, match="2"):
            main(command)
        error = capfd.readouterr().err
        assert message in error and str(file.path) in error.replace("\n", "")
        assert not (tmp_path / "engine").exists()
