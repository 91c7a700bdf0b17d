"""Per-channel gain and bias that bring each integer linear's outputs back to the float policy's, least squares."""

from __future__ import annotations

from typing import ClassVar

import msgspec
import torch
from torch import Tensor

from quantvla.passes.base import Kind, PassReport, Subject
from quantvla.passes.head_factors import Bound, limited, scale_output_
from quantvla.progress import Progress
from quantvla.statistics import OutputSums

WHAT = "output correction"


class CorrectOutputs(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="correct_output"
):
    """y -> g y + b per output channel, with E|t - g y - b|² least for t the teacher's output.

    Layer by layer in the order of a run, each measured with the ones before it corrected. g (``gain``)
    goes into the scales of the integers, b (``bias``) into the bias, which is added where there is none.
    Output head balancing is the case of one g for all channels of one linear, and no b.
    """

    phase: ClassVar[Kind] = "correction"
    gain: bool = True
    bias: bool = True
    clip: Bound = 0.30

    def __call__(self, subject: Subject, progress: Progress) -> PassReport:
        """Correct every planned linear."""
        layers: dict[tuple[str, str, int | None], list[str]] = {}
        for site in subject.observer.forward_order(list(subject.planned)):
            entry = subject.planned[site]
            layers.setdefault((entry.stage, entry.part, entry.layer), []).append(site)
        largest = 0.0
        for index, sites in enumerate(layers.values()):
            progress(WHAT, index, len(layers))
            for site, sums in subject.observer.outputs(sites, what=f"{WHAT}, {sites[0]}").items():
                gain, bias = fitted(sums, self.clip if self.gain else 0.0)
                scale_output_(subject, site, gain)
                if self.bias:
                    name = f"{site}.bias"
                    own = subject.floats.get(name) if subject.floats.has(name) else 0.0
                    subject.floats.put_(name, own + bias)
                largest = max(largest, float((gain - 1).abs().max()))
            subject.observer.corrected()
        progress(WHAT, len(layers), len(layers))
        return PassReport(
            kind="correct_output",
            notes=(f"{len(subject.planned)} linears, gains within {largest:.3f} of one",),
        )


def fitted(sums: OutputSums, clip: float) -> tuple[Tensor, Tensor]:
    """Return gain and bias per channel (out,), the gain within e^±``clip``; a silent channel keeps its own."""
    mean_t, mean_s = sums.t / sums.tokens, sums.s / sums.tokens
    variance = sums.ss / sums.tokens - mean_s.square()
    covariance = sums.ts / sums.tokens - mean_t * mean_s
    alive = variance > 1e-12 * sums.ss / sums.tokens
    gain = torch.where(alive, covariance / variance.clamp_min(1e-30), torch.ones_like(variance))
    gain = limited(gain.clamp_min(1e-3), clip, 0.0)
    return gain, mean_t - gain * mean_s
