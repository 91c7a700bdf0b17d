"""What QuantVLA's published code does to a linear, mistakes and all: a baseline, simulated in float only.

Facts from the code of arXiv 2602.20309: activation scales fixed per input channel by the first call
it sees, and a "rotation" by the principal axes of the weight, which gathers energy where a Hadamard
matrix spreads it.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec
import torch
from torch import Tensor

from quantvla.passes.base import Kind, PassReport, SiteError, Subject
from quantvla.passes.round_weights import weight_error
from quantvla.progress import Progress
from quantvla.quantizer import (
    INT8_MAX,
    QuantizedWeight,
    StaticInput,
    integer_linear,
    quantize_weight,
)
from quantvla.rotation import largest_power, zigzag
from quantvla.runtime.errors import explain

_EXPONENT, _BLOCK, _PERCENTILE = 0.15, 64, 0.999


class Published(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="published"
):
    """Smoothing, principal axes, zigzag order, principal axes; static scales from the first call; nearest weights."""

    phase: ClassVar[Kind] = "rounding"

    def __call__(self, subject: Subject, progress: Progress) -> PassReport:
        """Fill ``subject.weights``; every site must be planned as ``w4a8-static``."""
        sites = list(subject.planned)
        first = subject.observer.first_call(sites)
        errors = []
        for index, (site, entry) in enumerate(subject.planned.items()):
            progress("rounding weights", index, len(sites))
            if entry.scheme.inputs != "int8_static":
                raise explain(
                    site, "the published pass makes static activation scales only",
                    got=entry.scheme.name, remedy="plan it as w4a8-static or use another pass",
                )  # fmt: skip
            weight, x = subject.floats.get(f"{site}.weight"), first[site]
            rounded = _published_weight(
                weight, x.double(), entry.scheme.weight_bits, entry.scheme.block
            )
            subject.weights.put(site, rounded)
            exact = x @ weight.float().t()
            error = (integer_linear(x, rounded) - exact).norm() / exact.norm()
            back = QuantizedWeight(rounded.codes, rounded.scales, rounded.bits, rounded.block)
            transformed = weight @ torch.linalg.inv(_double(rounded.static).transform).t()
            errors.append(SiteError(site, len(x), weight_error(transformed, back), float(error)))
        return PassReport(
            kind="published", sites=tuple(errors),
            notes=("simulated in float: static activation scales per input channel have no integer form",),
        )  # fmt: skip


def _double(static: StaticInput | None) -> StaticInput:
    assert static is not None
    return StaticInput(static.transform.double(), static.scales)


def _published_weight(weight: Tensor, x: Tensor, bits: int, block: int) -> QuantizedWeight:
    smooth = x.abs().amax(0).clamp_min(1e-5) ** _EXPONENT
    smooth = smooth / weight.abs().amax(0).clamp_min(1e-5) ** (1 - _EXPONENT)
    size = largest_power(weight.shape[1], _BLOCK)
    first = _principal_axes(weight * smooth, size)
    order = zigzag((x / smooth @ first).abs().amax(0), size)
    axes = first[:, order] @ _principal_axes((weight * smooth @ first)[:, order], size)
    transform = axes / smooth[:, None]
    seen = (x @ transform).abs()
    scales = torch.quantile(seen, _PERCENTILE, dim=0).clamp_min(1e-8) / INT8_MAX
    nearest = quantize_weight(
        weight * smooth @ axes, bits, block, inputs="int8_static", search=False
    )
    static = StaticInput(transform.float().contiguous(), scales.float())
    return QuantizedWeight(nearest.codes, nearest.scales, bits, block, "int8_static", static)


def _principal_axes(weight: Tensor, block: int) -> Tensor:
    """Return block-diagonal eigenvectors of W^T W, largest eigenvalue first: (in, in)."""
    columns = torch.split(weight, block, dim=1)
    return torch.block_diag(*(torch.linalg.eigh(c.t() @ c).eigenvectors.flip(1) for c in columns))  # type: ignore[no-untyped-call,no-any-return]
