"""The rewrites between torch's ONNX export and an engine's graphs, in order.

All are exact: they change results by float rounding only. None knows a family; what they look for
is how exporters write things down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    NameFixPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)

from quantvla.export.rewrites.attention import fuse_attention_
from quantvla.export.rewrites.folding import (
    drop_nan_guards_,
    drop_neutral_,
    drop_uniform_masks_,
    fold_constants_,
)
from quantvla.export.rewrites.graph import CONTRIB
from quantvla.export.rewrites.layout import shorten_layouts_
from quantvla.export.rewrites.norms import fuse_rms_norms_
from quantvla.export.rewrites.rotary import fuse_rotary_
from quantvla.export.rewrites.scatter import concatenate_scatters_
from quantvla.export.rewrites.stacks import unstack_


@dataclass(frozen=True)
class Rewrite:
    """One rule: ``apply`` changes a graph in place and returns how often it did."""

    name: str
    apply: Callable[[ir.Model], int]


SIMPLIFY: tuple[Rewrite, ...] = (
    Rewrite("fold constants", fold_constants_),
    Rewrite("drop uniform masks", drop_uniform_masks_),
    Rewrite("drop neutral elements", drop_neutral_),
    Rewrite("drop NaN guards", drop_nan_guards_),
    Rewrite("concatenate scatters", concatenate_scatters_),
    Rewrite("unstack", unstack_),
)
"""Standard operators before and after: right for every target."""

SHORTEN: tuple[Rewrite, ...] = (Rewrite("shorten layouts", shorten_layouts_),)

FUSE_CPU: tuple[Rewrite, ...] = (
    Rewrite("fuse RMS norms", fuse_rms_norms_),
    Rewrite("fuse rotary embeddings", fuse_rotary_),
    Rewrite("fuse attention", fuse_attention_),
)
"""Into operators that ONNX Runtime's CPU provider has."""


def apply_rewrites_(model: ir.Model, rewrites: Sequence[Rewrite]) -> dict[str, int]:
    """Apply rewrites in order; returns how often each one changed the graph."""
    model.opset_imports.setdefault(CONTRIB, 1)
    counts = {}
    for rewrite in rewrites:
        counts[rewrite.name] = rewrite.apply(model)
        RemoveUnusedNodesPass()(model)
    CommonSubexpressionEliminationPass()(model)
    NameFixPass()(model)
    RemoveUnusedOpsetsPass()(model)
    return counts
