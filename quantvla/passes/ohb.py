"""Output head balancing: the energy of each attention's output made that of the float policy (arXiv 2602.20309)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec
import torch

from quantvla.passes.atm import Bound
from quantvla.passes.base import Factors, Kind, PassReport, Subject
from quantvla.passes.head_factors import EPSILON, clip_notes, limited, scale_output_
from quantvla.progress import Progress


class BalanceOutputs(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="ohb"
):
    """beta = RMS(teacher's attention output) / RMS(student's), per layer, after the output projection.

    It goes into W_o and b_o, or into the dequantization scales of an integer W_o. A gate on the
    residual comes later and does not mind. ``frames``: how many calibration frames are looked at
    (all of them when absent).
    """

    phase: ClassVar[Kind] = "correction"
    parts: tuple[str, ...] = ("expert",)
    clip: Bound = 0.30
    band: Bound = 0.03
    frames: Annotated[int, msgspec.Meta(ge=1)] | None = None

    def __call__(self, subject: Subject, progress: Progress) -> PassReport:
        """Measure every attention of ``parts`` at once, then fold."""
        attentions = [a for a in subject.structure.attentions if a.part in self.parts]
        seen = subject.observer.outputs(
            [a.o for a in attentions], what="attention output", frames=self.frames
        )
        factors = []
        for attention in attentions:
            sums = seen[attention.o]
            energies = [(total.sum() / sums.tokens).sqrt() for total in (sums.tt, sums.ss)]
            raw = energies[0] / (energies[1] + EPSILON)
            beta = limited(raw, self.clip, self.band)
            scale_output_(subject, attention.o, beta * torch.ones_like(sums.t))
            factors.append(
                Factors(attention.o, attention.part, attention.layer, (float(raw),), (float(beta),))
            )
        return PassReport(
            kind="ohb", factors=tuple(factors), clip=self.clip, band=self.band,
            notes=clip_notes("output balances", factors, self.clip),
        )  # fmt: skip
