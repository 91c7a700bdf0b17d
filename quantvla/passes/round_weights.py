"""Weights to integers by rounding, with the block scales of least activation-weighted error."""

from __future__ import annotations

from typing import Literal

import msgspec
import torch
from torch import Tensor, nn

from quantvla.passes.base import PassReport, SiteError, Subject
from quantvla.progress import Progress
from quantvla.quantizer import QuantizedWeight, quantize_weight


class RoundWeights(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="round_weights"
):
    """Round every planned weight; ``weighting`` says what an error in an input channel counts.

    ``second_moment``: E[x_k^2] over the calibration set (AWQ's and GPTQ's diagonal); ``none``:
    plain least squares on the weight.
    """

    weighting: Literal["second_moment", "none"] = "second_moment"

    def __call__(self, subject: Subject, progress: Progress) -> PassReport:
        """Fill ``subject.weights`` for all quantized sites of the plan; float weights stay as they are."""
        entries = subject.plan.quantized
        errors = []
        for index, entry in enumerate(entries):
            progress("rounding weights", index, len(entries))
            linear = subject.policy.get_submodule(entry.site)
            assert isinstance(linear, nn.Linear)
            moment = subject.statistics[entry.site].second_moment
            if entry.site not in subject.weights:
                importance = moment if self.weighting == "second_moment" else None
                weight = quantize_weight(
                    linear.weight,
                    entry.scheme.weight_bits,
                    entry.scheme.block,
                    importance,
                    entry.scheme.inputs,
                )
                subject.weights.put(entry.site, weight)
            errors.append(
                site_error(entry.site, linear.weight, subject.weights.get(entry.site), moment)
            )
        progress("rounding weights", len(entries), len(entries))
        return PassReport(kind="round_weights", sites=tuple(errors))


def site_error(site: str, weight: Tensor, quantized: QuantizedWeight, moment: Tensor) -> SiteError:
    """Return the error of a quantized weight (out, in) under input second moments (in,)."""
    with torch.no_grad():
        difference = (weight.double() - quantized.dequantize().double()).square()
        reference = weight.double().square()
        moment = moment.double()
        return SiteError(
            site=site,
            relative_weight_error=float((difference.sum() / reference.sum()).sqrt()),
            relative_output_error=float(
                ((difference * moment).sum() / (reference * moment).sum().clamp_min(1e-30)).sqrt()
            ),
        )
