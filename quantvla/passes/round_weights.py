"""Weights to integers by rounding, with the block scales of least activation-weighted error."""

from __future__ import annotations

from typing import ClassVar, Literal

import msgspec
import torch
from torch import Tensor

from quantvla.passes.base import Kind, PassReport, SiteError, Subject
from quantvla.progress import Progress
from quantvla.quantizer import QuantizedWeight, quantize_weight
from quantvla.statistics import SiteStatistics


class RoundWeights(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="round_weights"
):
    """Round every planned weight; ``weighting`` says what an error in an input channel counts.

    ``second_moment``: E[x_k^2] over the calibration set (AWQ's and GPTQ's diagonal); ``none``:
    plain least squares on the weight. ``scales``: ``search`` looks for the block scale of least
    error, ``largest`` takes the one that just covers the largest magnitude (round to nearest).
    """

    phase: ClassVar[Kind] = "rounding"
    weighting: Literal["second_moment", "none"] = "second_moment"
    scales: Literal["search", "largest"] = "search"

    def __call__(self, subject: Subject, progress: Progress) -> PassReport:
        """Fill ``subject.weights`` for all quantized sites of the plan; float weights stay as they are."""
        entries = subject.plan.quantized
        statistics = subject.observer.statistics()
        errors = []
        for index, entry in enumerate(entries):
            progress("rounding weights", index, len(entries))
            linear = subject.linear(entry.site)
            moment = statistics[entry.site].second_moment
            if entry.site not in subject.weights:
                importance = moment if self.weighting == "second_moment" else None
                weight = quantize_weight(
                    linear.weight,
                    entry.scheme.weight_bits,
                    entry.scheme.block,
                    importance,
                    entry.scheme.inputs,
                    search=self.scales == "search",
                )
                subject.weights.put(entry.site, weight)
            errors.append(
                site_error(
                    entry.site,
                    linear.weight,
                    subject.weights.get(entry.site),
                    statistics[entry.site],
                )
            )
        progress("rounding weights", len(entries), len(entries))
        return PassReport(kind="round_weights", sites=tuple(errors))


def weight_error(weight: Tensor, quantized: QuantizedWeight) -> float:
    """Return |W - Ŵ| / |W| (Frobenius)."""
    reference = weight.detach().double()
    return float((quantized.dequantize().double() - reference).norm() / reference.norm())


def site_error(
    site: str, weight: Tensor, quantized: QuantizedWeight, statistics: SiteStatistics
) -> SiteError:
    """Return the error of a quantized weight (out, in) under its input's second moments per channel."""
    with torch.no_grad():
        difference = (weight.double() - quantized.dequantize().double()).square()
        reference = weight.double().square()
        moment = statistics.second_moment
        return SiteError(
            site=site,
            rows=statistics.tokens,
            relative_weight_error=weight_error(weight, quantized),
            relative_output_error=float(
                ((difference * moment).sum() / (reference * moment).sum().clamp_min(1e-30)).sqrt()
            ),
        )
