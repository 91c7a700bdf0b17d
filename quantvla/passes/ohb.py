"""Output head balancing: the energy of each attention's output made that of the float policy (arXiv 2602.20309)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from quantvla.passes.base import Subject
from quantvla.passes.head_factors import EPSILON, AttentionCorrection, scale_output_
from quantvla.structure import Attention


class BalanceOutputs(AttentionCorrection, frozen=True, tag="ohb"):
    """beta = RMS(teacher's attention output) / RMS(student's), per layer, after the output projection.

    It goes into W_o and b_o, or into the dequantization scales of an integer W_o. A gate on the
    residual comes later and does not mind.
    """

    what: ClassVar[str] = "output balances"

    def ratios(self, subject: Subject, attentions: Sequence[Attention]) -> list[tuple[str, Tensor]]:
        """Return beta (a scalar) of every output projection."""
        seen = subject.observer.outputs(
            [a.o for a in attentions], what="attention output", frames=self.frames
        )
        found = []
        for attention in attentions:
            sums = seen[attention.o]
            teacher, student = ((total.sum() / sums.tokens).sqrt() for total in (sums.tt, sums.ss))
            found.append((attention.o, teacher / (student + EPSILON)))
        return found

    def fold_(self, subject: Subject, attention: Attention, factors: Tensor) -> None:
        """Multiply all outputs of the projection."""
        scale_output_(
            subject, attention.o, factors.expand(subject.linear(attention.o).out_features)
        )
