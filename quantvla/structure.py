"""What is connected to what inside a policy: the data that folds are made from.

A family fills it in once; a pass reads it and knows no family.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

# query projection, queries (batch, heads, length, head_dim) and keys as the logits are made of them,
# mask (batch, length, keys) that is true where a key may be read
AttentionCallback = Callable[[str, Tensor, Tensor, Tensor], None]
TapAttention = Callable[[AttentionCallback], AbstractContextManager[None]]


@dataclass(frozen=True)
class Modulation:
    """A linear that makes gain and shift of a norm from the time: of its output's ``pieces`` equal
    pieces, number ``scale`` is the gain (less the norm's offset) and number ``shift`` is added."""

    linear: str
    pieces: int
    scale: int
    shift: int


@dataclass(frozen=True)
class Norm:
    """A normalization and every linear that reads its output; its gain is ``offset + weight``.

    With a ``modulation`` it has no weight of its own: gain and shift are another in every call.
    """

    name: str
    kind: Literal["rms", "layer"]
    readers: tuple[str, ...]
    offset: float = 0.0
    modulation: Modulation | None = None


@dataclass(frozen=True)
class Attention:
    """One attention: its query and output projections.

    ``q_norm`` is the module between query projection and logits that makes their scale its own;
    its weight then broadcasts over (heads, head_dim) after ``q_norm_axis`` is inserted behind the
    heads (0: queries are (..., heads, head_dim); 1: (heads, length, head_dim)).
    """

    q: str
    o: str
    part: str
    layer: int
    heads: int
    head_dim: int
    q_norm: str | None = None
    q_norm_axis: int = 0


@dataclass(frozen=True)
class ValueReader:
    """A linear whose input is value heads side by side: its head i is value head ``i // repeat``."""

    site: str
    repeat: int


@dataclass(frozen=True)
class ValueHeads:
    """Value vectors, head by head: the projections that write them and those that read their averages."""

    name: str
    writers: tuple[str, ...]
    readers: tuple[ValueReader, ...]
    heads: int
    head_dim: int


@dataclass(frozen=True)
class Mlp:
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` when there is no gate."""

    up: str
    down: str
    gate: str | None = None


@dataclass(frozen=True)
class Stream:
    """A residual stream: the linears and embeddings that add to it, the norms that read it.

    ``obstacle`` says why nothing that mixes its channels folds ("" when it does).
    """

    name: str
    width: int
    writers: tuple[str, ...]
    norms: tuple[str, ...]
    obstacle: str = ""


@dataclass(frozen=True)
class Structure:
    """All of it. What a family does not list is not folded."""

    norms: tuple[Norm, ...] = ()
    attentions: tuple[Attention, ...] = ()
    values: tuple[ValueHeads, ...] = ()
    mlps: tuple[Mlp, ...] = ()
    streams: tuple[Stream, ...] = ()


EMPTY = Structure()


def no_attention(_callback: AttentionCallback) -> AbstractContextManager[None]:
    """Show nothing: the tap of a family that has none."""
    return nullcontext()
