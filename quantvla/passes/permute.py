"""Orders of channels that suit block scales and second-order rounding, built into the weights.

A kernel cannot gather channels for free, so the order is made physical: rows of what writes the
channels, columns of what reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, ClassVar, Literal

import msgspec
import torch
from torch import Tensor, nn

from quantvla.passes.base import Fold, Kind, Subject
from quantvla.rotation import zigzag
from quantvla.structure import Mlp, Norm, Stream

Place = Literal["streams", "mlps"]


class Permute(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="permute"
):
    """Reorder the channels between a producer and its readers.

    ``activation``: by second moment, largest first, the order in which GPTQ rounds best, shared by all
    readers; ``zigzag``: by largest magnitude, dealt out evenly to blocks (DuQuant, arXiv 2406.01721).
    ``places``: residual streams, hidden channels of MLPs.
    """

    phase: ClassVar[Kind] = "equivalence"
    order: Literal["activation", "zigzag"] = "activation"
    places: Annotated[tuple[Place, ...], msgspec.Meta(min_length=1)] = ("streams", "mlps")

    def folds(self, subject: Subject) -> Sequence[Fold]:
        """Return one fold per stream and MLP that a planned site reads."""
        structure, found = subject.structure, []
        norms = {norm.name: norm for norm in structure.norms}
        for stream in structure.streams if "streams" in self.places else ():
            if stream.obstacle:
                continue
            own = [norms[name] for name in stream.norms]
            order = self._order(subject, [site for norm in own for site in norm.readers])
            if order is not None:
                found.append(
                    Fold(stream.name, partial(_permute_stream_, subject, stream, own, order))
                )
        for mlp in structure.mlps if "mlps" in self.places else ():
            order = self._order(subject, [mlp.down])
            if order is not None:
                found.append(Fold(mlp.down, partial(_permute_mlp_, subject, mlp, order)))
        return found

    def notes(self, subject: Subject) -> tuple[str, ...]:
        """Return which streams that planned sites read keep their order, and why."""
        if "streams" not in self.places:
            return ()
        return tuple(
            f"residual stream {stream.name!r} keeps its order: {stream.obstacle}"
            for stream in subject.structure.streams
            if stream.obstacle
            and any(
                site in subject.planned
                for norm in subject.structure.norms
                if norm.name in stream.norms
                for site in norm.readers
            )
        )

    def _order(self, subject: Subject, readers: Sequence[str]) -> Tensor | None:
        planned = [site for site in readers if site in subject.planned]
        if not planned:
            return None
        statistics = subject.observer.statistics()
        if self.order == "activation":
            moments = [statistics[site].second_moment for site in planned]
            shares = torch.stack([moment / moment.sum() for moment in moments]).sum(0)
            return shares.argsort(descending=True, stable=True)
        sizes = torch.stack([statistics[site].largest for site in planned]).amax(0)
        return zigzag(sizes, min(subject.planned[site].scheme.block for site in planned))


def _permute_stream_(
    subject: Subject, stream: Stream, norms: Sequence[Norm], order: Tensor
) -> None:
    for writer in stream.writers:
        if isinstance(subject.policy.get_submodule(writer), nn.Embedding):
            _columns_(subject, writer, order)
        else:
            _rows_(subject, writer, order)
    for norm in norms:
        _rows_(subject, norm.name, order)
        for site in norm.readers:
            _columns_(subject, site, order)


def _permute_mlp_(subject: Subject, mlp: Mlp, order: Tensor) -> None:
    for writer in (mlp.up, mlp.gate):
        if writer is not None:
            _rows_(subject, writer, order)
    _columns_(subject, mlp.down, order)


def _rows_(subject: Subject, module: str, order: Tensor) -> None:
    for kind in ("weight", "bias"):
        name = f"{module}.{kind}"
        if hasattr(subject.policy.get_submodule(module), kind) and subject.floats.has(name):
            subject.floats.put_(name, subject.floats.get(name)[order])


def _columns_(subject: Subject, module: str, order: Tensor) -> None:
    subject.floats.change_rows_(f"{module}.weight", lambda rows: rows[:, order])
