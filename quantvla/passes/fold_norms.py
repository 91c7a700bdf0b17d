"""Norm gains and biases into the linears that read them; what is left is the bare normalization."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import msgspec
import torch

from quantvla.passes.base import Fold, Kind, Subject
from quantvla.structure import Norm


class FoldNorms(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="fold_norms"
):
    """``norm(x) * g + c`` then ``W``, ``b`` becomes ``norm(x)`` then ``W diag(g)``, ``b + W c``.

    What residual-wide rotations need first. A norm whose gain is one and bias zero is left alone,
    so that a second run changes nothing.
    """

    phase: ClassVar[Kind] = "equivalence"

    def folds(self, subject: Subject) -> Sequence[Fold]:
        """Return one fold per norm that has something to fold."""
        return [
            Fold(norm.name, partial(fold_norm_, subject, norm))
            for norm in subject.structure.norms
            if norm.modulation is None and not is_bare(subject, norm)
        ]

    def notes(self, subject: Subject) -> tuple[str, ...]:
        """Return how many norms do not fold, and why."""
        modulated = [norm for norm in subject.structure.norms if norm.modulation is not None]
        if not modulated:
            return ()
        return (
            f"{len(modulated)} norms ({modulated[0].name}, ...) keep gain and shift: they depend on the time",
        )


def is_bare(subject: Subject, norm: Norm) -> bool:
    """Return whether the norm multiplies by one and adds nothing."""
    if norm.modulation is not None:
        return False
    if not subject.floats.has(f"{norm.name}.weight"):
        return True
    gain = subject.floats.get(f"{norm.name}.weight") + norm.offset
    bias = norm.kind == "layer" and bool(subject.floats.get(f"{norm.name}.bias").any())
    return torch.equal(gain, torch.ones_like(gain)) and not bias


def fold_norm_(subject: Subject, norm: Norm) -> None:
    """Move gain and bias of ``norm`` into all its readers."""
    floats = subject.floats
    gain = floats.get(f"{norm.name}.weight") + norm.offset
    bias = floats.get(f"{norm.name}.bias") if norm.kind == "layer" else torch.zeros_like(gain)
    for site in norm.readers:
        weight = floats.get(f"{site}.weight")
        if bool(bias.any()):
            moved = weight @ bias
            own = floats.get(f"{site}.bias") if floats.has(f"{site}.bias") else 0.0
            floats.put_(f"{site}.bias", moved + own)
        floats.put_(f"{site}.weight", weight * gain)
    floats.put_(f"{norm.name}.weight", torch.ones_like(gain) - norm.offset)
    if norm.kind == "layer":
        floats.put_(f"{norm.name}.bias", torch.zeros_like(bias))
