"""Tuned scales: gradients, what changes and what does not, and runs that are stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantvla.calib_sets import CalibrationSet
from quantvla.checkpoint import load_quantized, read_card
from quantvla.distillation import VelocityMatching
from quantvla.passes import Pass, RoundWeights, TuneScales
from quantvla.passes.tune_scales import PROBES
from quantvla.quantize import quantize
from quantvla.quantized_linear import QuantizedLinear, SimulatedLinear, TunableLinear
from quantvla.quantizer import quantize_weight
from quantvla.recipe import Recipe, read_recipe
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.files import sha256_tree

TUNE = TuneScales(steps=40, rate=5e-3, batch=1)


def recipe(*passes: Pass) -> Recipe:
    base = read_recipe("rtn-w4a8")
    return Recipe(name="test", rules=base.rules, default=base.default, passes=passes)


@pytest.fixture(scope="module")
def rounded(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, tiny_frames: CalibrationSet
) -> Path:
    output = tmp_path_factory.mktemp("rounded") / "out"
    quantize(tiny_checkpoint, tiny_frames, recipe(RoundWeights()), output)
    return output


@pytest.fixture(scope="module")
def tuned(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, tiny_frames: CalibrationSet
) -> Path:
    output = tmp_path_factory.mktemp("tuned") / "out"
    quantize(tiny_checkpoint, tiny_frames, recipe(RoundWeights(), TUNE), output)
    return output


def integers(checkpoint: Path) -> dict[str, QuantizedLinear]:
    modules = load_quantized(checkpoint)[0].policy.named_modules()
    return {name: module for name, module in modules if isinstance(module, QuantizedLinear)}


def test_untouched_scales_compute_what_the_simulated_linear_does() -> None:
    x, weight = torch.randn(2, 3, 64), quantize_weight(torch.randn(5, 64), 4, 32)
    bias = torch.randn(5)
    assert torch.allclose(
        TunableLinear(weight, bias)(x), SimulatedLinear(weight, bias)(x), atol=1e-5
    )


def test_gradients_of_scales_are_exact_and_pass_the_rounding_of_inputs() -> None:
    torch.manual_seed(0)
    linear = TunableLinear(quantize_weight(torch.randn(5, 64), 4, 32), None)
    x = torch.randn(3, 64, requires_grad=True)
    linear(x).square().sum().backward()
    nudge, step = torch.randn(5, 2), 1e-3
    losses = []
    for sign in (1, -1):
        linear.ratio.data = torch.ones(5, 2) + sign * step * nudge
        losses.append(float(linear(x).detach().square().sum()))
    assert linear.ratio.grad is not None and x.grad is not None
    measured = (losses[0] - losses[1]) / (2 * step)
    assert measured == pytest.approx(float((linear.ratio.grad * nudge).sum()), rel=1e-3)
    linear.ratio.data = torch.ones(5, 2)
    expected = 2 * linear(x).detach() @ linear.tuned().dequantize()
    assert torch.allclose(x.grad, expected, rtol=1e-4, atol=1e-4)


def test_scales_change_and_codes_formats_and_float_weights_do_not(
    rounded: Path, tuned: Path
) -> None:
    before, after = integers(rounded), integers(tuned)
    assert before.keys() == after.keys() and before
    changed = 0
    for name, linear in before.items():
        ours = after[name].quantized
        assert torch.equal(ours.codes, linear.quantized.codes)
        assert ours.scales.dtype == torch.float16
        assert (ours.bits, ours.block, ours.inputs) == (
            linear.quantized.bits, linear.quantized.block, linear.quantized.inputs
        )  # fmt: skip
        changed += int((ours.scales != linear.quantized.scales).sum())
    assert changed > 0.9 * sum(linear.quantized.scales.numel() for linear in before.values())
    floats = [load_file(path / "policy" / "model.safetensors") for path in (rounded, tuned)]
    assert all(torch.equal(floats[0][name], floats[1][name]) for name in floats[0])


def test_the_error_on_draws_not_trained_on_falls_and_is_reported(tuned: Path) -> None:
    (note,) = read_card(tuned).reports[-1].notes
    before, after = (float(part.strip(" %")) for part in note.split(":")[-1].split("->"))
    assert f"{PROBES} draws not trained on" in note
    assert after < 0.9 * before


@pytest.mark.parametrize("done", [10, 35])
def test_a_run_stopped_while_tuning_continues_to_the_same_bytes(
    done: int, tiny_checkpoint: Path, tiny_frames: CalibrationSet, tuned: Path, tmp_path: Path
) -> None:
    class StopError(Exception):
        pass

    steps: list[int] = []

    def stop(what: str, step: int, _total: int) -> None:
        if what == "tuning scales":
            steps.append(step)
            if len(steps) == done + 1 and step == done:
                raise StopError

    passes = recipe(RoundWeights(), TUNE)
    with pytest.raises(StopError):
        quantize(tiny_checkpoint, tiny_frames, passes, tmp_path / "out", progress=stop)
    quantize(tiny_checkpoint, tiny_frames, passes, tmp_path / "out", progress=stop)
    assert steps[done + 1] == done // 25 * 25  # from the last kept state, not from the start
    assert sha256_tree(tmp_path / "out") == sha256_tree(tuned)


def test_an_error_that_is_not_finite_stops_and_names_the_step(
    tiny_checkpoint: Path,
    tiny_frames: CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = VelocityMatching.loss

    def broken(self: VelocityMatching, linears: object, draw: int) -> Tensor:
        found = original(self, linears, draw)  # type: ignore[arg-type]
        return found * float("nan") if draw == PROBES + 3 else found

    monkeypatch.setattr(VelocityMatching, "loss", broken)
    with pytest.raises(
        QuantVLAError, match=r"tune_scales: .* not finite, got nan in step 3; lower"
    ):
        quantize(tiny_checkpoint, tiny_frames, recipe(RoundWeights(), TUNE), tmp_path / "out")
    assert not (tmp_path / "out").exists()
