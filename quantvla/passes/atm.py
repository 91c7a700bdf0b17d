"""Attention temperature matching: the spread of each head's logits made that of the float policy (arXiv 2602.20309)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from quantvla.passes.base import Subject
from quantvla.passes.head_factors import EPSILON, AttentionCorrection, scale_output_
from quantvla.runtime.errors import explain
from quantvla.structure import Attention


class MatchTemperature(AttentionCorrection, frozen=True, tag="atm"):
    """alpha = Std(teacher's logits) / Std(student's), per head, multiplied into the student's logits.

    It goes into the rows of W_q and b_q of the head (rotary embedding commutes with it), or where a
    q-norm follows W_q, into the gain of that norm, one per head from then on.
    """

    what: ClassVar[str] = "head temperatures"

    def ratios(self, subject: Subject, attentions: Sequence[Attention]) -> list[tuple[str, Tensor]]:
        """Return alpha (heads,) of every query projection. Raises `QuantVLAError` for logits that nothing shows."""
        seen = subject.observer.logits(
            [a.q for a in attentions], what="attention temperature", frames=self.frames
        )
        for query, sums in seen.items():
            if not sums.student.count:
                raise explain(
                    query, "the family shows no logits of this attention, so it has no temperature",
                    remedy="leave its part out of the recipe's atm pass",
                )  # fmt: skip
        return [
            (query, sums.teacher.deviation / (sums.student.deviation + EPSILON))
            for query, sums in ((a.q, seen[a.q]) for a in attentions)
        ]

    def fold_(self, subject: Subject, attention: Attention, factors: Tensor) -> None:
        """Multiply the logits of each head."""
        fold_temperature_(subject, attention, factors)


def fold_temperature_(subject: Subject, attention: Attention, alpha: Tensor) -> None:
    """Multiply the logits of head h by ``alpha[h]``; alpha: (heads,)."""
    if attention.q_norm is None:
        scale_output_(subject, attention.q, alpha.repeat_interleave(attention.head_dim))
        return
    name = f"{attention.q_norm}.weight"
    gain = subject.floats.get(name)
    shape = [attention.heads, *[1] * attention.q_norm_axis, 1]
    if gain.dim() == 1:
        gain = gain.view(*[1] * (len(shape) - 1), attention.head_dim)
    subject.floats.put_(name, gain * alpha.double().view(shape))
