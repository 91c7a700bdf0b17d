from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from quantvla.calib_sets import open_set
from quantvla.cli.verify import verify as command
from quantvla.export.engine import export_engine
from quantvla.export.integers import integer_sites
from quantvla.fidelity import kernels as fidelity_kernels
from quantvla.quantize import quantize
from quantvla.recipe import read_recipe
from quantvla.runtime import kernels
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.files import sha256_file
from quantvla.runtime.kernels import graph_file
from quantvla.runtime.manifest import encode_manifest, read_manifest
from quantvla.testing.smolvla import write_random_checkpoint
from quantvla.verify import _same_integers, verify
from quantvla.verify_report import KernelError, Thresholds, VerifyReport


@pytest.fixture(scope="module")
def tiny_int8(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, tiny_set: Path
) -> Path:
    """A checkpoint in which rounding activations is most of the quantization error."""
    output = tmp_path_factory.mktemp("quantized") / "int8"
    calibration = open_set(tiny_set).part("calibration")
    quantize(tiny_checkpoint, calibration, read_recipe("int8"), output)
    return output


def test_a_float_engine_passes_with_no_quantization(
    tiny_float_engine: Path, tiny_checkpoint: Path, tiny_set: Path
) -> None:
    report = verify(tiny_float_engine, tiny_checkpoint, open_set(tiny_set).part("heldout"))
    assert report.passed and report.integer_sites == 0
    assert report.parity.max_abs < 1e-4 and report.kernel.max_abs < 1e-4
    assert report.quantization.nrmse < 1e-5 and report.quantization.cosine_min > 0.999999


def test_an_integer_engine_is_near_its_reference_and_further_from_float(
    tiny_integer_engine: Path,
    tiny_float_engine: Path,
    tiny_checkpoint: Path,
    tiny_quantized: Path,
    tiny_set: Path,
) -> None:
    report = verify(
        tiny_integer_engine,
        tiny_checkpoint,
        open_set(tiny_set).part("heldout"),
        float_engine=tiny_float_engine,
        quantized=tiny_quantized,
    )
    assert report.passed and report.integer_sites > 0
    assert report.parity.max_abs < 1e-4
    assert report.kernel.max_abs < 1e-5  # the reference rounds activations as kernels do
    assert report.kernel.share is not None and 0 < report.kernel.share < 0.2
    assert report.kernel.velocity_nrmse is not None and report.kernel.rounding_nrmse is not None
    assert (
        len(report.quantization.velocity_teacher_forced)
        == len(report.quantization.velocity_free_running)
        == 10
    )
    assert 1 - report.integer_bytes / report.half_bytes >= 0.7


def test_with_8_bit_weights_correct_programs_differ_by_their_roundings(
    tiny_int8: Path, tiny_float_engine: Path, tiny_checkpoint: Path, tiny_set: Path, tmp_path: Path
) -> None:
    """No small share of the quantization error, which consists of roundings; but no more than these explain."""
    export_engine(tiny_int8, "cpu", tmp_path / "engine")
    report = verify(
        tmp_path / "engine",
        tiny_checkpoint,
        open_set(tiny_set).part("heldout"),
        float_engine=tiny_float_engine,
        quantized=tiny_int8,
    )
    assert report.passed and report.chunk_limits_kept is not None
    assert "rounding" in report.chunk_limits_kept
    assert report.kernel.max_abs is not None and report.kernel.max_abs < 1e-5
    assert report.kernel.rounding_nrmse is not None and 0 < report.kernel.rounding_nrmse < 0.05


@pytest.mark.parametrize("checkpoint", ["tiny_quantized", "tiny_int8"])
def test_a_wrong_kernel_is_noticed(
    request: pytest.FixtureRequest,
    checkpoint: str,
    tiny_float_engine: Path,
    tiny_checkpoint: Path,
    tiny_set: Path,
    tmp_path: Path,
) -> None:
    """A bias added to one output, as a defect in a kernel or a rewrite would, must fail verification."""
    engine, quantized = tmp_path / "engine", request.getfixturevalue(checkpoint)
    export_engine(quantized, "cpu", engine)
    manifest = read_manifest(engine)
    path = engine / graph_file(manifest.stages[-1])  # the one that runs here
    model = onnx.load(path)
    bias = next(t for t in model.graph.initializer if t.name.endswith("action_out_proj.bias"))
    bias.CopyFrom(
        onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(0.05), bias.name)
    )
    onnx.save(model, path)
    files = {name: sha256_file(engine / name) for name in manifest.files}
    (engine / "manifest.json").write_bytes(
        encode_manifest(msgspec.structs.replace(manifest, files=files))
    )
    report = verify(
        engine,
        tiny_checkpoint,
        open_set(tiny_set).part("heldout"),
        float_engine=tiny_float_engine,
        quantized=quantized,
    )
    assert not report.passed and "kernel chunks" in report.failed
    assert report.chunk_limits_kept == ()
    assert report.kernel.share is not None and report.kernel.share > 0.5


@pytest.mark.skipif(kernels.available().library is None, reason="own kernels are not built")
def test_own_attentions_are_compared_call_by_call_and_in_chunks_with_float_products(
    wide_heads: Any, tiny_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of bfloat16 are no defect of the integers, a wrong attention is one."""

    def verified() -> VerifyReport:
        heldout = open_set(tiny_set).part("heldout")
        made = wide_heads
        return verify(made.engine, made.checkpoint, heldout, quantized=made.quantized)

    report = verified()
    has_bfloat16 = kernels.BFLOAT16 in kernels.available().attention
    assert report.passed and report.kernel.attention_max_abs is not None
    assert (report.kernel.bfloat16_nrmse is not None) == has_bfloat16
    assert report.kernel.attention_max_abs < (2**-7 if has_bfloat16 else 1e-5)
    assert report.kernel.share is not None and report.kernel.share < 0.05
    for wrong in (0.01, float("nan")):
        found = iter((0.0, wrong))  # not the first call
        monkeypatch.setattr(
            fidelity_kernels, "attention_difference", lambda *_, f=found, **__: next(f, 0.0)
        )
        assert verified().failed == ("attention",)


def test_chunks_are_compared_with_the_checkpoint_of_the_same_integers_only(
    tiny_quantized: Path, tiny_integer_engine: Path
) -> None:
    integers = list(integer_sites(tiny_integer_engine, read_manifest(tiny_integer_engine)))
    _same_integers(tiny_integer_engine, tiny_quantized, integers)
    with pytest.raises(QuantVLAError, match=r"has other integers than .*; give the quantized"):
        _same_integers(tiny_integer_engine, tiny_quantized, integers[1:])


def test_another_checkpoint_is_refused(
    tiny_float_engine: Path, tiny_set: Path, tmp_path: Path
) -> None:
    other = write_random_checkpoint(tmp_path / "other", seed=5)
    with pytest.raises(QuantVLAError, match="was made from another checkpoint"):
        verify(tiny_float_engine, other, open_set(tiny_set).part("heldout"))


def test_the_command_prints_the_agreed_json_and_exits_by_result(
    tiny_float_engine: Path, tiny_checkpoint: Path, tiny_set: Path
) -> None:
    arguments = [
        str(tiny_float_engine),
        "--policy.path",
        str(tiny_checkpoint),
        "--calib",
        str(tiny_set),
        "--json",
    ]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["pass"] is True
    assert "max_abs" in found["parity"] and "max_abs" in found["kernel"]
    assert {"cosine_mean", "cosine_p5", "cosine_min", "nrmse"} <= found["quantization"].keys()
    failed = CliRunner().invoke(command, [*arguments, "--parity-threshold", "0"])
    assert failed.exit_code == 1 and json.loads(failed.stdout)["pass"] is False
    assert json.loads(failed.stdout)["failed"] == ["parity"]
    shown = CliRunner().invoke(command, [*arguments[:-1], "--parity-threshold", "0"])
    assert "fail: parity" in shown.stdout and "no integers; whole chunks" in shown.stdout


@pytest.mark.parametrize(
    ("nrmse", "share", "velocity", "rounding", "kept"),
    [
        (0.001, 0.5, 0.01, 0.004, ("kernel",)),
        (0.01, 0.1, None, None, ("kernel_share",)),
        (0.001, 0.1, 0.01, 0.005, ("kernel_share", "kernel", "rounding")),
        (0.01, 0.5, 0.01, 0.006, ("rounding",)),
        (0.01, 0.5, 0.01, 0.004, ()),
        (None, None, None, None, None),
    ],
)
def test_whole_chunks_pass_by_any_limit_which_is_named(
    nrmse: float | None,
    share: float | None,
    velocity: float | None,
    rounding: float | None,
    kept: tuple[str, ...] | None,
) -> None:
    found = KernelError(0.0, nrmse, nrmse, share, velocity, rounding)
    assert found.chunk_limits_kept(Thresholds()) == kept


def test_thresholds_have_the_issue_values() -> None:
    assert Thresholds() == Thresholds(
        parity=1e-4, kernel=1e-3, kernel_share=0.2, cosine_mean=0.98, rounding=2
    )
