"""Slice assignments, which are exported as ScatterND, written as the concatenation they are."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quantvla.export.rewrites.graph import Editor, constant, made_by, shape_of


def concatenate_scatters_(model: ir.Model) -> int:
    """Replace ScatterND chains that overwrite every row of a tensor, range by range, by one Concat."""
    changed = 0
    for node in list(model.graph):
        if node.op_type != "ScatterND":
            continue
        if any(user.op_type == "ScatterND" for user in node.outputs[0].consumers()):
            continue  # not the last of its chain
        parts = _parts(node)
        if parts is None:
            continue
        editor = Editor(model, node)
        joined = editor.add(
            "Concat", parts, axis=0, shape=shape_of(node.outputs[0]),
            dtype=node.outputs[0].dtype or ir.DataType.FLOAT,
        )  # fmt: skip
        editor.substitute(node.outputs[0], joined)
        changed += 1
    return changed


def _parts(last: ir.Node) -> list[ir.Value] | None:
    """Return what the chain writes, in the order of the rows, if it leaves no row of the original."""
    shape = shape_of(last.outputs[0])
    if not shape:
        return None
    ranges: dict[int, tuple[int, ir.Value]] = {}
    node: ir.Node | None = last
    while node is not None:
        indices, update = constant(node.inputs[1]), node.inputs[2]
        reduction = node.attributes.get("reduction")
        if indices is None or update is None or indices.ndim != 2 or indices.shape[1] != 1:
            return None
        if reduction is not None and reduction.as_string() != "none":
            return None
        rows = indices[:, 0]
        if not np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))) or rows[0] < 0:
            return None
        ranges.setdefault(int(rows[0]), (len(rows), update))
        earlier = node.inputs[0]
        node = made_by(earlier, "ScatterND")
    row = 0
    parts = []
    for start, (length, update) in sorted(ranges.items()):
        if start != row:
            return None
        parts.append(update)
        row += length
    return parts if row == shape[0] else None
