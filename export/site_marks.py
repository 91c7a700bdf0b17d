"""Linears as single marked nodes: the graph is exported without their weights, which are put in per target.

A mark is a node of its own operator that carries the site's name. Lowering on the graph, not in torch,
keeps float copies of large weights out of the trace and gives every product the name of its site.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
import torch
from torch import Tensor, nn

DOMAIN, OPERATOR, ATTRIBUTE = "quantvla", "Site", "site"


class SiteMark(nn.Module):
    """Exports as one ``quantvla::Site`` node: x (..., in) -> (..., out) float32."""

    def __init__(self, site: str, out_features: int) -> None:
        super().__init__()
        self.site, self.out_features = site, out_features
        # some policies ask a projection, or the module around it, for its weights' dtype first
        self.weight = nn.Parameter(torch.empty(0, dtype=torch.float32), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{OPERATOR}", [x], attrs={ATTRIBUTE: self.site},
            dtype=torch.float32, shape=(*x.shape[:-1], self.out_features), version=1,
        )  # fmt: skip
        return out


def is_mark(node: ir.Node) -> bool:
    """Return whether a node is a mark."""
    return node.domain == DOMAIN and node.op_type == OPERATOR


def marks(model: ir.Model) -> Iterator[tuple[str, ir.Node]]:
    """Yield (site, node) of every mark, in graph order; safe while marks are replaced."""
    for node in list(model.graph):
        if is_mark(node):
            yield node.attributes[ATTRIBUTE].as_string(), node
