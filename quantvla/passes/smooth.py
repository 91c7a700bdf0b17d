"""Channel scales between a producer and its readers, chosen with the real quantizers in the loop.

SmoothQuant (arXiv 2211.10438) moves outliers of activations into weights, AWQ (arXiv 2306.00978)
protects the weights of channels that are large. Both multiply the readers' columns by s and divide
what writes the channel by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

import msgspec
import torch
from torch import Tensor

from quantvla.float_weights import FloatWeights, scale_rows
from quantvla.passes.base import Fold, Kind, Subject
from quantvla.quantizer import integer_linear, quantize_weight
from quantvla.statistics import SiteStatistics
from quantvla.structure import Mlp, Modulation, Norm, ValueHeads

Exponent = Annotated[float, msgspec.Meta(ge=0, le=1)]
Place = Literal["norms", "values", "mlps"]


class Smooth(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="smooth"
):
    """Scale input channels by ``a^e / w^(1-e)`` (``smoothquant``) or ``a^e`` (``awq``), floored.

    a: the channel's largest magnitude (``smoothquant``) or root mean square (``awq``) over the calibration set; w: the
    largest magnitude of its weights. Of the ``exponents``, and no scaling, each producer gets what
    leaves the least output error of its readers on kept inputs, quantized as planned. A single exponent is
    taken without asking when ``search`` is false. ``places``: gains of norms, value heads (shared
    by all that read them), and the products inside gated MLPs.
    """

    phase: ClassVar[Kind] = "equivalence"
    exponents: Annotated[tuple[Exponent, ...], msgspec.Meta(min_length=1)] = (0.15, 0.25, 0.35, 0.5)
    formula: Literal["smoothquant", "awq"] = "smoothquant"
    search: bool = True
    places: Annotated[tuple[Place, ...], msgspec.Meta(min_length=1)] = ("norms", "values", "mlps")
    floor: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 1e-3

    def folds(self, subject: Subject) -> Sequence[Fold]:
        """Return one fold per producer whose planned readers gain from a scale."""
        statistics = subject.observer.statistics()
        found = []
        for joint in self._joints(subject):
            scale = self._best(subject, joint, statistics)
            if scale is not None:
                found.append(Fold(joint.name, partial(_apply_, subject.floats, joint, scale)))
        return found

    def notes(self, subject: Subject) -> tuple[str, ...]:
        """Return which planned sites no scale reaches, and why."""
        plain = [mlp.down for mlp in subject.structure.mlps if mlp.gate is None]
        return tuple(
            f"{site}: no scale folds into its input, which is behind the activation function"
            for site in plain
            if site in subject.planned and "mlps" in self.places
        )

    def _joints(self, subject: Subject) -> Iterator[_Joint]:
        structure = subject.structure
        if "norms" in self.places:
            yield from (_norm_joint(norm) for norm in structure.norms)
        if "values" in self.places:
            yield from (_value_joint(heads) for heads in structure.values)
        if "mlps" in self.places:
            yield from (_mlp_joint(mlp) for mlp in structure.mlps if mlp.gate is not None)

    def _best(
        self, subject: Subject, joint: _Joint, statistics: Mapping[str, SiteStatistics]
    ) -> Tensor | None:
        planned = [site for site in joint.readers if site in subject.planned]
        if not planned:
            return None
        activation = torch.stack(
            [joint.gathered(site, self._size(statistics[site])) for site in planned]
        ).amax(0)
        weight = torch.stack(
            [
                joint.gathered(site, subject.floats.get(f"{site}.weight").abs().amax(0))
                for site in planned
            ]
        ).amax(0)
        candidates = [self._scale(activation, weight, exponent) for exponent in self.exponents]
        if not self.search:
            return candidates[0]
        error, best = _error(subject, joint, planned, statistics, None), None
        for scale in candidates:
            found = _error(subject, joint, planned, statistics, scale)
            if found < error:
                error, best = found, scale
        return best

    def _size(self, statistics: SiteStatistics) -> Tensor:
        if self.formula == "awq":
            return statistics.second_moment.sqrt()
        return statistics.largest.double()

    def _scale(self, activation: Tensor, weight: Tensor, exponent: float) -> Tensor:
        """Return s (channels,), at least ``floor`` of its largest, with geometric mean of extremes 1."""
        scale = activation.clamp_min(1e-8) ** exponent
        if self.formula == "smoothquant":
            scale = scale / weight.clamp_min(1e-8) ** (1 - exponent)
        scale = scale.clamp_min(float(scale.max()) * self.floor)
        return scale / (scale.max() * scale.min()).sqrt()


@dataclass(frozen=True)
class _Joint:
    """Channels that can be scaled: who reads them in which order, who writes them.

    ``repeat``: a reader's head i is head ``i // repeat`` of the channels, which are in heads of ``head_dim``;
    0 for readers whose inputs are the channels in order.
    """

    name: str
    readers: dict[str, int]
    rows: tuple[str, ...] = ()
    norm: Norm | None = None
    head_dim: int = 0

    def spread(self, site: str, scale: Tensor) -> Tensor:
        """Return the scale of each input of a reader: (channels,) -> (in,)."""
        repeat = self.readers[site]
        if repeat == 0:
            return scale
        return scale.view(-1, self.head_dim).repeat_interleave(repeat, 0).reshape(-1)

    def gathered(self, site: str, values: Tensor) -> Tensor:
        """Return the largest value per channel of those of a reader's inputs: (in,) -> (channels,)."""
        repeat = self.readers[site]
        return values if repeat == 0 else values.view(-1, repeat, self.head_dim).amax(1).reshape(-1)


def _norm_joint(norm: Norm) -> _Joint:
    return _Joint(norm.name, dict.fromkeys(norm.readers, 0), norm=norm)


def _value_joint(heads: ValueHeads) -> _Joint:
    readers = {reader.site: reader.repeat for reader in heads.readers}
    return _Joint(heads.name, readers, rows=heads.writers, head_dim=heads.head_dim)


def _mlp_joint(mlp: Mlp) -> _Joint:
    return _Joint(mlp.down, {mlp.down: 0}, rows=(mlp.up,))


def _apply_(floats: FloatWeights, joint: _Joint, scale: Tensor) -> None:
    for site in joint.readers:
        name = f"{site}.weight"
        floats.put_(name, floats.get(name) * joint.spread(site, scale))
    for site in joint.rows:
        for kind in ("weight", "bias"):
            if floats.has(f"{site}.{kind}"):
                name = f"{site}.{kind}"
                floats.put_(name, scale_rows(floats.get(name), scale.reciprocal()))
    if joint.norm is not None and joint.norm.modulation is not None:
        _scale_modulation_(floats, joint.norm, joint.norm.modulation, scale)
    elif joint.norm is not None:
        _scale_norm_(floats, joint.norm, scale)


def _scale_norm_(floats: FloatWeights, norm: Norm, scale: Tensor) -> None:
    """Divide gain and bias by ``scale`` (channels,); a norm that has none gets them."""
    name = f"{norm.name}.weight"
    gain = floats.get(name) + norm.offset if floats.has(name) else torch.ones_like(scale)
    floats.put_(name, gain / scale - norm.offset)
    if norm.kind == "layer":
        name = f"{norm.name}.bias"
        floats.put_(name, floats.get(name) / scale if floats.has(name) else torch.zeros_like(scale))


def _scale_modulation_(
    floats: FloatWeights, norm: Norm, modulation: Modulation, scale: Tensor
) -> None:
    """Divide gain and shift by ``scale`` (channels,) whatever the time: ``(offset + s)/c`` and ``b/c``."""
    weight, bias = (f"{modulation.linear}.{kind}" for kind in ("weight", "bias"))
    factors = torch.ones(modulation.pieces, len(scale), dtype=torch.float64)
    factors[[modulation.scale, modulation.shift]] = scale.double().reciprocal()
    offset = torch.zeros_like(factors)
    offset[modulation.scale] = norm.offset
    floats.put_(weight, scale_rows(floats.get(weight), factors.reshape(-1)))
    moved = (floats.get(bias) + offset.reshape(-1)) * factors.reshape(-1) - offset.reshape(-1)
    floats.put_(bias, moved)


def _error(
    subject: Subject, joint: _Joint, sites: Sequence[str], statistics: Mapping[str, SiteStatistics],
    scale: Tensor | None,
) -> float:  # fmt: skip
    """Return the summed squared output error of the planned readers, each relative to its own output."""
    total = 0.0
    for site in sites:
        scheme, rows = subject.planned[site].scheme, statistics[site].rows
        weight = subject.floats.get(f"{site}.weight").float()
        exact = rows @ weight.t()
        if scale is not None:
            spread = joint.spread(site, scale).float()
            rows, weight = rows / spread, weight * spread
        rounded = quantize_weight(
            weight, scheme.weight_bits, scheme.block, inputs=scheme.inputs, search=False
        )
        error = (integer_linear(rows, rounded) - exact).square().sum()
        total += float(error / exact.square().sum().clamp_min(1e-30))
    return total
