"""What corrections of attentions share: from a measured ratio to the factor that is folded, and where it goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar

import msgspec
import torch
from torch import Tensor

from quantvla.float_weights import scale_rows
from quantvla.passes.base import Factors, Kind, PassReport, Subject
from quantvla.progress import Progress
from quantvla.quantizer import QuantizedWeight
from quantvla.runtime.errors import explain, nearest
from quantvla.structure import Attention

EPSILON = 1e-6
Bound = Annotated[float, msgspec.Meta(ge=0)]


class AttentionCorrection(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind"
):
    """Multiplies something of every attention of ``parts`` by what the float policy has over what it is now.

    ``clip``, ``band``: see `limited`. ``frames``: how many calibration frames are looked at (all of
    them when absent).
    """

    phase: ClassVar[Kind] = "correction"
    what: ClassVar[str]
    parts: tuple[str, ...] = ("expert",)
    clip: Bound = 0.30
    band: Bound = 0.03
    frames: Annotated[int, msgspec.Meta(ge=1)] | None = None

    def ratios(self, subject: Subject, attentions: Sequence[Attention]) -> list[tuple[str, Tensor]]:
        """Return for each attention the linear that is named in the report and its factors as measured."""
        raise NotImplementedError

    def fold_(self, subject: Subject, attention: Attention, factors: Tensor) -> None:
        """Multiply by ``factors``, of the shape that `ratios` returned."""
        raise NotImplementedError

    def __call__(self, subject: Subject, progress: Progress) -> PassReport:
        """Measure every attention of ``parts`` at once, then fold. Raises `QuantVLAError` for a part without any."""
        attentions = self._attentions(subject)
        factors = []
        for attention, (site, raw) in zip(
            attentions, self.ratios(subject, attentions), strict=True
        ):
            applied = limited(raw, self.clip, self.band)
            self.fold_(subject, attention, applied)
            factors.append(
                Factors(
                    site, attention.part, attention.layer,
                    tuple(raw.reshape(-1).tolist()), tuple(applied.reshape(-1).tolist()),
                )
            )  # fmt: skip
        return PassReport(
            kind=str(self.__struct_config__.tag), factors=tuple(factors), clip=self.clip,
            band=self.band, notes=clip_notes(self.what, factors, self.clip),
        )  # fmt: skip

    def _attentions(self, subject: Subject) -> list[Attention]:
        known = {attention.part for attention in subject.structure.attentions}
        for part in self.parts:
            if part not in known:
                raise explain(
                    f"part {part!r} of a recipe's {self.__struct_config__.tag} pass",
                    "the policy's structure has no attention there",
                    remedy=nearest(part, known) if known else "leave the pass out",
                )
        return [a for a in subject.structure.attentions if a.part in self.parts]


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
