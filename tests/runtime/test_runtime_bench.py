from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_engine import STEPS, change_manifest

from quantvla.cli.bench import bench as bench_command
from quantvla.runtime.bench import bench
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.machine import memory, physical_cores


def test_json_has_the_fixed_names(pristine_engine: Path) -> None:
    result = CliRunner().invoke(
        bench_command,
        [str(pristine_engine), "--json", "--repeats", "5", "--warmup", "1", "--threads", "1"],
        catch_exceptions=False,
    )
    report = json.loads(result.stdout)
    assert report["stages"].keys() == {"vision", "prefix", "denoise"}
    for times in [report["chunk_ms"], report["loop_ms"], *report["stages"].values()]:
        assert 0 < times["p50"] <= times["p99"]
    assert report["loop_ms"]["p50"] > report["stages"]["denoise"]["p50"]
    assert report["denoise_steps"] == STEPS and report["threads"] == 1
    assert report["versions"].keys() >= {"quantvla", "onnxruntime", "numpy", "python"}
    # The process that measured holds an interpreter, numpy, ONNX Runtime and the engine: no torch.
    assert 20 < report["before_load_mb"] < report["resident_mb"] <= report["peak_rss_mb"] < 300


def test_table_is_for_people(pristine_engine: Path) -> None:
    result = CliRunner().invoke(
        bench_command, [str(pristine_engine), "--repeats", "2"], catch_exceptions=False
    )
    for text in ("vision", "denoise (one step)", "denoise (all steps)", "MiB resident", "threads"):
        assert text in result.stdout


def test_the_childs_message_comes_through(engine: Path) -> None:
    change_manifest(engine, target="tpu")
    with pytest.raises(QuantVLAError, match="manifest target: this runtime cannot run it, got"):
        bench(engine, repeats=1)


def test_a_child_that_dies_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(QuantVLAError, match="measuring process failed with status 1"):
        bench(tmp_path)


def test_repeats_are_checked(tmp_path: Path) -> None:
    with pytest.raises(QuantVLAError, match="expected repeats >= 1 and warmup >= 0, got 0 and 5"):
        bench(tmp_path, repeats=0)


def test_machine() -> None:
    assert physical_cores() >= 1
    now = memory()
    assert now is None or 0 < now.anonymous_mb <= now.resident_mb <= now.peak_rss_mb
