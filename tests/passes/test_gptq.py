from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quantvla.passes import Gptq
from quantvla.pipeline import Pipeline
from quantvla.quantizer import quantize_weight
from quantvla.runtime.errors import QuantVLAError
from quantvla.schemes import Scheme
from quantvla.second_order import (
    SecondOrder,
    corrected_target,
    relative_error,
    round_second_order,
)

SCHEME = Scheme("w4a8", 4, 8, 16)


def correlated(rows: int, channels: int, seed: int = 0) -> Tensor:
    """Inputs with outlier channels and few strong directions, as layers see them."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(rows, 6, generator=generator) @ torch.randn(6, channels, generator=generator)
    noise = 0.3 * torch.randn(rows, channels, generator=generator)
    return (few + noise) * (1 + 4 * torch.rand(channels, generator=generator) ** 8)


@pytest.mark.parametrize(
    "options", [SecondOrder(), SecondOrder(dynamic=True), SecondOrder(polish=2)]
)
def test_second_order_rounding_loses_less_than_rounding_to_nearest(options: SecondOrder) -> None:
    x = correlated(512, 64)
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    moments = (x.t() @ x).double()
    nearest = quantize_weight(weight, 4, 16, moments.diagonal())
    rounded = round_second_order(weight, moments, SCHEME, options)
    assert relative_error(weight, rounded, moments) < 0.8 * relative_error(weight, nearest, moments)
    assert rounded.codes.min() >= -8 and rounded.codes.max() <= 7


def test_polishing_never_loses() -> None:
    x = correlated(512, 64)
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    moments = (x.t() @ x).double()
    errors = [
        relative_error(
            weight, round_second_order(weight, moments, SCHEME, SecondOrder(polish=rounds)), moments
        )
        for rounds in (0, 1, 3)
    ]
    assert errors[2] <= 1.001 * errors[1] and errors[1] <= 1.001 * errors[0]


def test_relative_error_is_that_of_the_outputs() -> None:
    x = correlated(512, 64)
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    rounded = quantize_weight(weight, 4, 16)
    expected = (x @ (weight - rounded.dequantize()).t()).norm() / (x @ weight.t()).norm()
    found = relative_error(weight, rounded, (x.t() @ x).double())
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_the_corrected_target_makes_up_for_drift() -> None:
    teacher = correlated(512, 64)
    student = teacher + 0.2 * correlated(512, 64, seed=3) + 0.1
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(1)).double()
    moments = (student.t() @ student).double()
    target = corrected_target(weight, moments, (teacher.t() @ student).double(), 1e-6)
    wanted = teacher.double() @ weight.t()
    drifted = (student.double() @ weight.t() - wanted).norm()
    assert (student.double() @ target.t() - wanted).norm() < 0.7 * drifted
    same = corrected_target(weight, moments, moments, 0.01)
    assert torch.allclose(same, weight, atol=1e-8)


def test_too_few_rows_are_refused_with_the_number_needed(pipeline: Callable[..., Pipeline]) -> None:
    with pytest.raises(
        QuantVLAError,
        match=r"q_proj: gptq needs at least 64 calibration rows .* got \d+ from \d+ frames; "
        r"calibrate with at least \d+ frames",
    ):
        pipeline().run([Gptq(step="stage")])


def test_the_fallback_is_reported_and_everything_else_is_compensated(
    pipeline: Callable[..., Pipeline],
) -> None:
    made = pipeline()
    (report,) = made.run([Gptq(step="stage", too_few="round")])
    assert report.notes
    assert all(note.startswith("warning: ") for note in report.notes)
    assert all("without second-order compensation" in note for note in report.notes)
    assert [site.site for site in report.sites] == [e.site for e in made.subject.plan.quantized]
    assert all(site.rows > 0 for site in report.sites)
