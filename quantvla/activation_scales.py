"""Static scales for 8-bit and 4-bit float inputs with one scale per tensor, and the smoothing that makes one scale enough.

A GPU's int8 and fp8 products take one input scale for the whole tensor, fixed at compile time. Input
channels differ in range, so each is divided by a factor that its weight column is multiplied with
(SmoothQuant, arXiv 2211.10438): exact in real arithmetic, and one multiplication inside the kernel
that quantizes anyway. The exponent is searched per site by the expected squared error of the product.

Inputs beyond the range are clipped, and a policy can be wrong by tens of percent on the frame where that
happens. The range is therefore that of calibration, widened per channel by as much as one half of
the frames fell short of the other (by the square root of the ratio).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantvla.runtime.errors import explain
from quantvla.statistics import SiteStatistics

INT8_MAX = 127
FP8_MAX = 448.0  # largest finite E4M3 number
NVFP4_MAX = 6.0 * FP8_MAX  # largest E2M1 number at the largest scale of a block
_TOP = {"int8": INT8_MAX, "fp8": FP8_MAX, "nvfp4": NVFP4_MAX}
_MANTISSA_BITS = {"fp8": 3, "nvfp4": 1}
EXPONENTS = (None, 0.0, 0.15, 0.3, 0.5, 0.65, 0.8, 0.9, 1.0)
INT8_LIMIT = 0.025
"""Expected relative error of a product above which one int8 input scale is not enough: what fp8's rounding costs."""
_WIDEST = 4.0  # most that a channel's range is widened
_FLOOR = 1e-3  # of the largest factor: a channel that calibration never saw active stays bounded


@dataclass(frozen=True)
class StaticInput:
    """How a site's input is quantized: codes = round(x / smoothing / scale).

    ``smoothing``: (in,) float32, all ones when it does not help; ``scale``: the input scale.
    ``exponent``: of the search, None without smoothing. ``error``: expected relative error of the product.
    """

    smoothing: Tensor
    scale: float
    exponent: float | None
    error: float


def static_input(
    site: str, weight: Tensor, statistics: SiteStatistics, number_format: str
) -> StaticInput:
    """Return the smoothing and scale of least expected error for a weight (out, in).

    Raises `QuantVLAError` when calibration saw nothing but zeros, or no input at all.
    """
    largest = expected_largest(statistics)
    if statistics.calls == 0 or float(largest.max()) <= 0:
        raise explain(
            site,
            "calibration saw no input for it, so it has no range",
            remedy="calibrate with more frames, or leave the site in half precision",
        )
    moment = statistics.second_moment.double()
    power = (weight.double().square() * moment).sum().clamp_min(1e-30)
    best: StaticInput | None = None
    for exponent in EXPONENTS:
        smoothing = _smoothing(largest, weight, exponent)
        error = _expected_error(weight, largest, moment, smoothing, number_format) / power
        found = StaticInput(
            smoothing, float((largest / smoothing).max()) / _TOP[number_format], exponent,
            float(error.sqrt()),
        )  # fmt: skip
        if best is None or found.error < best.error:
            best = found
    assert best is not None
    return best


def static_inputs(
    weights: Mapping[str, Tensor],
    statistics: Mapping[str, SiteStatistics],
    groups: Sequence[Sequence[str]],
    formats: Mapping[str, str],
) -> dict[str, StaticInput]:
    """Return `static_input` of every site in ``groups``: sites that read the same tensor share theirs.

    A shared scale lets the GPU quantize the tensor once and multiply it with all their weights in one
    product. Sites of a group have one format.
    """
    found: dict[str, StaticInput] = {}
    for group in groups:
        joined = torch.cat([weights[site] for site in group])
        shared = static_input(group[0], joined, statistics[group[0]], formats[group[0]])
        found.update(dict.fromkeys(group, shared))
    return found


def expected_largest(statistics: SiteStatistics) -> Tensor:
    """Return the magnitudes per channel that inputs like those of calibration stay within: (in,) float32.

    With a single call there is nothing to compare, and it is what calibration saw.
    """
    low, high = statistics.halves.float().aminmax(dim=0)
    if not low.any():
        return high
    wider = (high / low.clamp_min(1e-12)).sqrt().clamp_max(_WIDEST)
    return high * wider.clamp_min(1.0)


def fits_int8(static: StaticInput) -> bool:
    """Whether one scale for the whole input is good enough for int8."""
    return static.error <= INT8_LIMIT


def _smoothing(largest: Tensor, weight: Tensor, exponent: float | None) -> Tensor:
    if exponent is None:
        return torch.ones_like(largest)
    columns = weight.detach().float().abs().amax(0).clamp_min(1e-12)
    factor = largest.clamp_min(1e-12) ** exponent / columns ** (1 - exponent)
    factor = factor / factor.max()
    return factor.clamp_min(_FLOOR)


def _expected_error(
    weight: Tensor, largest: Tensor, moment: Tensor, smoothing: Tensor, number_format: str
) -> Tensor:
    """Return E|error|^2 of the product, summed over outputs, roundings taken as independent.

    int8 rounds to a uniform grid, variance step^2 / 12; floats with m mantissa bits by a relative
    error of variance 2^-(2m + 2) / 12 of the value's own square. Smoothing changes nothing for those.
    """
    smooth_weight = weight.detach().double() * smoothing.double()
    if number_format in _MANTISSA_BITS:
        relative = 2.0 ** -(2 * _MANTISSA_BITS[number_format] + 2) / 12
        return 2 * relative * (weight.double().square() * moment).sum()
    step = (largest.double() / smoothing.double()).max() / INT8_MAX
    of_input = step.square() / 12 * smooth_weight.square().sum()
    row_steps = smooth_weight.abs().amax(1) / INT8_MAX
    of_weight = (row_steps.square() / 12).sum() * (moment / smoothing.double().square()).sum()
    return of_input + of_weight
