"""Attention temperature matching: the spread of each head's logits made that of the float policy (arXiv 2602.20309)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec
from torch import Tensor

from quantvla.passes.base import Factors, Kind, PassReport, Subject
from quantvla.passes.head_factors import EPSILON, clip_notes, limited, scale_output_
from quantvla.progress import Progress
from quantvla.structure import Attention

Bound = Annotated[float, msgspec.Meta(ge=0)]


class MatchTemperature(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="atm"
):
    """alpha = Std(teacher's logits) / Std(student's), per head, multiplied into the student's logits.

    It goes into the rows of W_q and b_q of the head (rotary embedding commutes with it), or where a
    q-norm follows W_q, into the gain of that norm, one per head from then on. ``frames``: how many
    calibration frames are looked at (all of them when absent).
    """

    phase: ClassVar[Kind] = "correction"
    parts: tuple[str, ...] = ("expert",)
    clip: Bound = 0.30
    band: Bound = 0.03
    frames: Annotated[int, msgspec.Meta(ge=1)] | None = None

    def __call__(self, subject: Subject, progress: Progress) -> PassReport:
        """Measure every attention of ``parts`` at once, then fold."""
        attentions = [a for a in subject.structure.attentions if a.part in self.parts]
        seen = subject.observer.logits(
            [a.q for a in attentions], what="attention temperature", frames=self.frames
        )
        factors = []
        for attention in attentions:
            sums = seen[attention.q]
            raw = sums.teacher.deviation / (sums.student.deviation + EPSILON)
            alpha = limited(raw, self.clip, self.band)
            fold_temperature_(subject, attention, alpha)
            factors.append(
                Factors(
                    attention.q,
                    attention.part,
                    attention.layer,
                    tuple(raw.tolist()),
                    tuple(alpha.tolist()),
                )
            )
        return PassReport(
            kind="atm", factors=tuple(factors), clip=self.clip, band=self.band,
            notes=clip_notes("head temperatures", factors, self.clip),
        )  # fmt: skip


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
