"""Which formats every site is offered, and how big its work is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from quantvla.families.base import LoadedPolicy
from quantvla.plan import PlanEntry
from quantvla.runtime.errors import explain, nearest
from quantvla.schemes import FLOAT, INTEGER_SCHEMES, Scheme, format_of, resolve_scheme
from quantvla.staged import run_stage

DEFAULT_FORMATS = (
    "float", "w4a8:16", "w4a8:32", "w4a8:64", "w4a8:128", "w8a8:32", "w8a8:128", "w8a8-dynamic",
)  # fmt: skip
KERNEL_BLOCKS = (16, 32, 48, 64, 128, 192, 240, 256, 320)


@dataclass(frozen=True)
class Format:
    """A format as it is written on the command line: ``w4a8:32`` is the scheme and its block."""

    scheme: str
    block: int

    def fits(self, in_features: int) -> bool:
        """Return whether a row of that many weights divides into blocks."""
        return self.block == 0 or in_features % self.block == 0

    def resolve(self, entry: PlanEntry) -> Scheme:
        """Return the scheme of this format for a site."""
        return resolve_scheme(
            self.scheme, (self.block,), site=entry.site, in_features=entry.in_features
        )


def parse_formats(texts: Sequence[str]) -> tuple[Format, ...]:
    """Return the formats written as ``scheme:block``, or ``scheme`` where there is no block."""
    return tuple(dict.fromkeys(_parse(text) for text in texts))


def _parse(text: str) -> Format:
    scheme, _, block = text.partition(":")
    known = (FLOAT.name, *INTEGER_SCHEMES)
    if scheme not in known:
        raise explain(f"format {text!r}", "unknown scheme", remedy=nearest(scheme, known))
    blocked = scheme not in (FLOAT.name, "w8a8-dynamic")
    expected = ", ".join(map(str, KERNEL_BLOCKS)) if blocked else "none"
    if block not in ({str(b) for b in KERNEL_BLOCKS} if blocked else {""}):
        raise explain(
            f"format {text!r}", f"its block must be one of: {expected}", got=block or "none",
            remedy=f"write {scheme}:32" if blocked else f"write {scheme}",
        )  # fmt: skip
    return Format(scheme, int(block or 0))


def format_name(scheme: Scheme) -> str:
    """Return how a scheme is written, see `format_of`."""
    if scheme.is_float:
        return scheme.name
    return format_of(scheme.weight_bits, scheme.inputs, scheme.block)


def offers(entry: PlanEntry, formats: Sequence[Format]) -> tuple[Scheme, ...]:
    """Return the schemes a site can have, those whose block does not divide its input left out."""
    found = tuple(f.resolve(entry) for f in formats if f.fits(entry.in_features))
    if not found:
        raise explain(
            entry.site,
            "none of the formats on offer fits its input dimension",
            got=entry.in_features,
            remedy="offer float, w8a8-dynamic or a smaller block",
        )
    return found


def left_out(entries: Sequence[PlanEntry], formats: Sequence[Format]) -> tuple[str, ...]:
    """Return a sentence for each format that some sites are not offered because its block does not divide their input."""
    notes = []
    for form in formats:
        widths = [e.in_features for e in entries if not form.fits(e.in_features)]
        if widths:
            notes.append(
                f"{form.scheme}:{form.block} is not offered at {len(widths)} of {len(entries)} sites: "
                f"their inputs of {', '.join(map(str, sorted(set(widths))))} are no multiple of {form.block}"
            )
    return tuple(notes)


def input_shapes(loaded: LoadedPolicy, sites: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every site's input in an engine: each stage is run once, on ones."""
    shapes: dict[str, tuple[int, ...]] = {}

    def hook(site: str) -> Any:
        def record(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            shapes[site] = tuple(inputs[0].shape)

        return record

    handles = [
        loaded.policy.get_submodule(site).register_forward_pre_hook(hook(site)) for site in sites
    ]
    try:
        for stage in loaded.stages:
            run_stage(stage, {spec.name: np.ones(spec.shape, spec.dtype) for spec in stage.inputs})
    finally:
        for handle in handles:
            handle.remove()
    return shapes
