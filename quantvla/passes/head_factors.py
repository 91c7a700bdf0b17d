"""From a measured ratio to the factor that is folded, and where factors on outputs go."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from quantvla.float_weights import scale_rows
from quantvla.passes.base import Factors, Subject
from quantvla.quantizer import QuantizedWeight
from quantvla.runtime.errors import explain

EPSILON = 1e-6


def limited(raw: Tensor, clip: float, band: float) -> Tensor:
    """Return ``raw`` within e^±clip, and exactly 1 where its logarithm is below ``band`` (arXiv 2602.20309)."""
    within = raw.double().clamp(math.exp(-clip), math.exp(clip))
    return torch.where(raw.double().log().abs() < band, torch.ones_like(within), within)


def scale_output_(subject: Subject, site: str, factors: Tensor) -> None:
    """Multiply the outputs of a linear by ``factors`` (out,): its weight or the scales of its integers, and its bias."""
    if site in subject.weights:
        weight = subject.weights.get(site)
        scales = (weight.scales.double() * factors.double()[:, None]).half()
        if not bool(torch.isfinite(scales).all()):
            raise explain(
                site, "its scales leave the range of half precision",
                got=float(factors.abs().max()), remedy="use a smaller clip",
            )  # fmt: skip
        subject.weights.put(
            site, QuantizedWeight(weight.codes, scales, weight.bits, weight.block, weight.inputs)
        )
    else:
        name = f"{site}.weight"
        subject.floats.put_(name, scale_rows(subject.floats.get(name), factors))
    if subject.floats.has(f"{site}.bias"):
        name = f"{site}.bias"
        subject.floats.put_(name, scale_rows(subject.floats.get(name), factors))


def clip_notes(what: str, factors: Sequence[Factors], clip: float) -> tuple[str, ...]:
    """Return a warning with the share of factors that were cut at the bound, if any were."""
    raw = [value for entry in factors for value in entry.raw]
    cut = sum(abs(math.log(value)) > clip for value in raw)
    if not cut:
        return ()
    return (
        f"warning: {cut} of {len(raw)} {what} ({cut / len(raw):.0%}) were clipped at e^±{clip:g}: "
        "quantization changes these attentions more than the correction may repair",
    )
