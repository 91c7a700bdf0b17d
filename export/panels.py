"""Weights in the layout that the project's own kernels read: panels of 16 output rows (`runtime/kernels/linear.h`).

A file holds the panels once. The graph of ONNX Runtime's own operators gets its layout from them by
a transposition, which is folded when the graph is loaded; the graph of own operators reads them as
they lie in the file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quantvla.export.kernels import INT8_ACCURACY_LEVEL, MATMUL_NBITS, site_name
from quantvla.export.rewrites.graph import Editor, constant

PANEL = 16  # output rows stored together
_GROUP = 4  # bytes of one row stored together: what one lane of an integer dot product takes
SMALLEST_BLOCK = 8


def to_panels(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return rows of packed codes (out, bytes), see `pack_codes`, as panels (out / 16, bytes * 16)."""
    rows, size = packed.shape
    groups = packed.reshape(rows // PANEL, PANEL, size // _GROUP, _GROUP)
    return np.ascontiguousarray(groups.transpose(0, 2, 1, 3)).reshape(rows // PANEL, size * PANEL)


def from_panels(panels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the rows (out, bytes) of `to_panels`."""
    count, size = panels.shape
    groups = panels.reshape(count, size // (PANEL * _GROUP), PANEL, _GROUP)
    return np.ascontiguousarray(groups.transpose(0, 2, 1, 3)).reshape(count * PANEL, size // PANEL)


def fits(node: ir.Node) -> bool:
    """Whether a ``MatMulNBits`` node has the shape and format that the own kernels take."""
    bits, level, out_features, block = (
        node.attributes[name].as_int() for name in ("bits", "accuracy_level", "N", "block_size")
    )
    return level == INT8_ACCURACY_LEVEL and bits in (4, 8) and shape_fits(out_features, block)


def shape_fits(out_features: int, block: int) -> bool:
    """Whether the own kernels take so many rows, in blocks of the operator of that size."""
    return out_features % PANEL == 0 and block % SMALLEST_BLOCK == 0


def store_panels_(
    model: ir.Model, blocks: Mapping[str, int], leave: Collection[str] = frozenset()
) -> int:
    """Store the weights of all kernels that fit as panels, but for the sites in ``leave``; returns how many fit.

    ``blocks`` is the block of the scheme by site. Where the operator's own block is smaller, every
    scale is stored once and repeated when the graph is loaded.
    """
    found = 0
    known: dict[ir.Value, ir.Value] = {}  # the exporter lets equal constants be one
    for node in [node for node in model.graph if node.op_type == MATMUL_NBITS.operator]:
        weight, scales = node.inputs[MATMUL_NBITS.weight], node.inputs[MATMUL_NBITS.scales]
        if not fits(node) or weight is None or scales is None or constant(weight) is None:
            continue
        found += 1
        if site_name(node) in leave:
            values = constant(scales)
            if values is not None and (scales in known or len(scales.uses()) > 1):
                # shared with one that becomes panels
                copy = Editor(model, node).constant(f"{weight.name}.scales", values)
                node.replace_input_with(MATMUL_NBITS.scales, copy)
            continue
        block = blocks.get(site_name(node), node.attributes["block_size"].as_int())
        editor = Editor(model, node)
        if weight not in known:
            known[weight] = _weight(editor, weight)
        if scales not in known:
            known[scales] = _scales(editor, node, scales, block)
        node.replace_input_with(MATMUL_NBITS.weight, known[weight])
        node.replace_input_with(MATMUL_NBITS.scales, known[scales])
    return found


def _weight(editor: Editor, weight: ir.Value) -> ir.Value:
    codes = constant(weight)
    assert codes is not None and weight.name is not None
    rows, blocks, size = codes.shape
    panels = to_panels(codes.reshape(rows, blocks * size))
    name = weight.name
    del editor.graph.initializers[name]
    stored = editor.constant(name, panels)
    groups = editor.reshape(stored, (rows // PANEL, blocks * size // _GROUP, PANEL, _GROUP))
    result = editor.reshape(editor.transpose(groups, (0, 2, 1, 3)), (rows, blocks, size))
    result.name = f"{name}.rows"
    return result


def _scales(editor: Editor, node: ir.Node, scales: ir.Value, block: int) -> ir.Value:
    values = constant(scales)
    assert values is not None and scales.name is not None
    rows, own = node.attributes["N"].as_int(), node.attributes["block_size"].as_int()
    repeat = block // own
    values = values.reshape(rows, -1)
    if not np.array_equal(values[:, ::repeat].repeat(repeat, axis=1), values):
        raise ValueError(f"{scales.name}: scales differ inside blocks of {block}")
    half = values[:, ::repeat].astype(np.float16)
    if not np.array_equal(half.astype(np.float32), values[:, ::repeat]):
        raise ValueError(f"{scales.name}: scales are not half-precision numbers")
    count = half.shape[1]
    panels = np.ascontiguousarray(half.reshape(rows // PANEL, PANEL, count).transpose(0, 2, 1))
    name = scales.name
    del editor.graph.initializers[name]
    stored = editor.constant(name, panels)
    value = editor.reshape(editor.transpose(stored, (0, 2, 1)), (rows, count))
    if repeat > 1:
        value = editor.reshape(value, (rows, count, 1))
        shape = editor.constant(f"shape.{rows}x{count}x{repeat}", np.array([rows, count, repeat]))
        value = editor.add(
            "Expand", [value, shape], shape=(rows, count, repeat), dtype=ir.DataType.FLOAT16
        )
        value = editor.reshape(value, (rows, count * repeat))
    return editor.add("Cast", [value], shape=(rows, count * repeat), to=ir.DataType.FLOAT.value)
