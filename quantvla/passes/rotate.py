"""Rotations that fold away: of whole residual streams (R1) and of value heads (R2).

QuaRot (arXiv 2404.00456) and SpinQuant (arXiv 2405.16406) for Hadamard matrices; with ``block`` and ``zigzag``
the transform of DuQuant (arXiv 2406.01721), rotation, permutation, rotation, which is one orthogonal
matrix and folds where R1 does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, ClassVar

import msgspec
import torch
from torch import Tensor, nn

from quantvla.passes.base import Fold, Kind, Subject
from quantvla.passes.fold_norms import is_bare
from quantvla.rotation import largest_power, random_hadamard, zigzag
from quantvla.runtime.errors import explain, nearest
from quantvla.structure import Stream, ValueHeads


class Rotate(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="rotate"
):
    """Rotate the residual ``streams`` named (null: all that a rotation folds into), and value heads where ``values``.

    A stream's norms must be bare RMSNorms (``fold_norms`` before it). Values are rotated head by
    head, with one matrix for all towers that attend to them.
    """

    phase: ClassVar[Kind] = "equivalence"
    streams: tuple[str, ...] | None = None
    values: bool = True
    block: Annotated[int, msgspec.Meta(ge=2)] | None = None
    zigzag: bool = False
    seed: int = 0

    def folds(self, subject: Subject) -> Sequence[Fold]:
        """Return one fold per stream and per group of value heads. Raises `QuantVLAError` where one does not fold."""
        known = {stream.name: stream for stream in subject.structure.streams}
        found = []
        for name in [s.name for s in self._all(subject)] if self.streams is None else self.streams:
            if name not in known:
                raise explain(f"residual stream {name!r}", "unknown", remedy=nearest(name, known))
            matrix = self._matrix(subject, _foldable(subject, known[name]))
            found.append(Fold(name, partial(_rotate_stream_, subject, known[name], matrix)))
        for heads in subject.structure.values if self.values else ():
            matrix = random_hadamard(heads.head_dim, self.seed)
            found.append(Fold(heads.name, partial(_rotate_values_, subject, heads, matrix)))
        return found

    def notes(self, subject: Subject) -> tuple[str, ...]:
        """Return which streams and planned inputs no rotation reaches, and why."""
        left = [
            f"residual stream {stream.name!r} is not rotated: {stream.obstacle}"
            for stream in subject.structure.streams
            if self.streams is None and stream.obstacle
        ]
        return (*left, *self._products(subject))

    def _all(self, subject: Subject) -> Sequence[Stream]:
        return [stream for stream in subject.structure.streams if not stream.obstacle]

    def _products(self, subject: Subject) -> tuple[str, ...]:
        return tuple(
            f"{mlp.down}: its input is behind a product with an activation function, no rotation folds there"
            for mlp in subject.structure.mlps
            if mlp.down in subject.planned
        )

    def _matrix(self, subject: Subject, stream: Stream) -> Tensor:
        first = random_hadamard(stream.width, self.seed, self.block)
        if not self.zigzag:
            return first
        statistics = subject.observer.statistics()
        norms = {norm.name: norm.readers for norm in subject.structure.norms}
        seen = [
            statistics[site].rows
            for norm in stream.norms
            for site in norms[norm]
            if site in subject.planned
        ]
        order = torch.arange(stream.width)
        if seen:
            sizes = (torch.cat(seen).double() @ first).abs().amax(0)
            order = zigzag(sizes, largest_power(stream.width, self.block or stream.width))
        return first[:, order] @ random_hadamard(stream.width, self.seed + 1, self.block)


def _foldable(subject: Subject, stream: Stream) -> Stream:
    """Return the stream if a rotation of it folds. Raises `QuantVLAError` with the reason if not."""
    if stream.obstacle:
        raise explain(
            f"residual stream {stream.name!r}",
            f"a rotation of it does not fold: {stream.obstacle}",
            remedy="leave it out of the streams of the recipe's rotate pass",
        )
    for norm in subject.structure.norms:
        if norm.name in stream.norms and not is_bare(subject, norm):
            raise explain(
                norm.name,
                "its gain is not folded, and no rotation commutes with a gain per channel",
                remedy="put a fold_norms pass before rotate",
            )
    return stream


def _rotate_stream_(subject: Subject, stream: Stream, matrix: Tensor) -> None:
    """Turn x into x R everywhere in the stream: what writers add, what readers expect."""
    floats = subject.floats
    for writer in stream.writers:
        name = f"{writer}.weight"
        if isinstance(subject.policy.get_submodule(writer), nn.Embedding):
            floats.change_rows_(name, lambda rows: rows @ matrix)
        else:
            floats.put_(name, matrix.t() @ floats.get(name))
            if floats.has(f"{writer}.bias"):
                floats.put_(f"{writer}.bias", floats.get(f"{writer}.bias") @ matrix)
    for norm in subject.structure.norms:
        for site in norm.readers if norm.name in stream.norms else ():
            floats.change_rows_(f"{site}.weight", lambda rows: rows @ matrix)


def _rotate_values_(subject: Subject, heads: ValueHeads, matrix: Tensor) -> None:
    """Turn every value head v into v R, and take it back in what reads the averages."""
    floats = subject.floats
    for writer in heads.writers:
        for kind in ("weight", "bias"):
            name = f"{writer}.{kind}"
            if floats.has(name):
                value = floats.get(name)
                blocks = value.view(heads.heads, heads.head_dim, -1)
                floats.put_(name, (matrix.t() @ blocks).reshape(value.shape))
    for reader in heads.readers:
        name = f"{reader.site}.weight"
        weight = floats.get(name)
        blocks = weight.view(weight.shape[0], -1, heads.head_dim)
        floats.put_(name, (blocks @ matrix).reshape(weight.shape))
