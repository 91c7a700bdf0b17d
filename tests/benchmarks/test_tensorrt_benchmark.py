from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.slow
FOLDER = Path(__file__).parents[2] / "benchmarks" / "tensorrt"
PARTS = ("bench", "comparison")


@pytest.fixture
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """One of the folder's scripts, run as from its folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in PARTS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location(
        f"tensorrt_{request.param}", FOLDER / f"{request.param}.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # msgspec looks the types up there
    spec.loader.exec_module(module)
    for name in PARTS:  # removed again with the monkeypatch
        if name in sys.modules:
            monkeypatch.setitem(sys.modules, name, sys.modules[name])
    return module


@pytest.fixture
def common(tiny_checkpoint: Path, tiny_set: Path, tmp_path: Path) -> list[str]:
    return [
        "--policy", str(tiny_checkpoint), "--calib", str(tiny_set), "--frames", "3", "--heldout", "2",
        "--work", str(tmp_path / "work"), "-o", str(tmp_path / "result.json"),
    ]  # fmt: skip


@pytest.mark.parametrize("script", ["variants"], indirect=True)
def test_variants_are_measured_once(
    script: ModuleType, common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main([*common, "--passes", "none"])
    rows = json.loads((tmp_path / "result.json").read_text())
    errors = {(r["format"], r["grid_bits"], r["per_step"]): r["error"]["rms"] for r in rows}
    narrow = {r["embedding"]: r["error"]["rms"] for r in rows if r["format"] == "fp16"}
    assert 0 < narrow["int8"] < narrow["int4"] < 0.2
    int8, per_step = errors["int8", 8, False], errors["int8", 8, True]
    assert 0 < int8 < errors["nvfp4", 8, False] < 1
    assert 0 < per_step < 2 * int8 and per_step != int8
    capsys.readouterr()
    script.main([*common, "--passes", "none"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("script", ["run"], indirect=True)
def test_builds_and_errors_are_written(
    script: ModuleType, common: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    script.main([*common, "--formats", "fp16", "int4", "fp8", "--compute-capability", "86"])
    result = json.loads((tmp_path / "result.json").read_text())
    stages = ("vision", "prefix", "denoise")
    assert [(b["format"], b["stage"]) for b in result["builds"]] == [
        (number_format, stage) for number_format in ("fp16", "int4", "fp8") for stage in stages
    ]
    assert all("SM86: this engine was planned for" in b["refused"] for b in result["builds"][6:])
    assert not any(b["refused"] or b["fallbacks"] for b in result["builds"][:6])
    assert result["four_bit_share_of_fp16"].keys() == {f"{stage} SM86" for stage in stages}
    numerics = result["numerics"]
    assert 0 < numerics["target_fp16"]["rms"] < numerics["target_int8"]["rms"] < 0.1
    assert numerics["ratio"] == numerics["target_int8"]["rms"] / numerics["cpu_w8a8"]["rms"]


@pytest.mark.parametrize("script", ["embedding"], indirect=True)
def test_tensorrt_keeps_the_bits_of_a_table_and_reads_the_wanted_rows_only(
    script: ModuleType, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    script.main(["--rows", "9000", "--width", "64", "-o", str(tmp_path / "result.json")])
    half, int8, int4 = json.loads((tmp_path / "result.json").read_text())
    table = 2 * 9000 * 64
    saved = half["plan_bytes"] - int8["plan_bytes"], half["plan_bytes"] - int4["plan_bytes"]
    assert saved[0] == pytest.approx(table * (1 - 66 / 128), rel=0.03)
    assert saved[1] == pytest.approx(table * (1 - 36 / 128), rel=0.03)
    assert half["layers"] == int8["layers"] == int4["layers"] == 1
