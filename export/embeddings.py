"""Token embeddings with fewer bits: a table of integers, dequantized where its rows are looked up.

tensorrt_rtx 1.7 fuses DequantizeLinear and Gather into one kernel that reads the wanted rows only, so the
table is stored in the plan as it is here. ``int8`` has one scale for a row, ``int4`` one for a block of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from quantvla.export.eight_bits import integer_columns
from quantvla.export.tensorrt_nodes import HALF, NUMPY_HALF, initializer
from quantvla.quantizer import quantize_weight
from quantvla.runtime.errors import explain
from quantvla.runtime.site_formats import EmbeddingFormat

_INT4_BLOCK = 32
_ROWS = 8192  # rounded at a time: the search for scales holds several copies


def narrow_embeddings_(
    model: ir.Model, stage: str, number_format: str, activations: str
) -> tuple[tuple[EmbeddingFormat, ...], frozenset[ir.Node]]:
    """Store the tables that token ids look up in ``number_format`` ("half": as they are).

    Returns what changed, and the nodes whose types are final. Raises `QuantVLAError` for a table whose rows are
    no whole blocks.
    """
    found: list[EmbeddingFormat] = []
    final: set[ir.Node] = set()
    if number_format == "half":
        return (), frozenset()
    for value, gathers in list(_tables(model.graph)):
        assert value.const_value is not None
        array = np.asarray(value.const_value.numpy(), np.float32)
        if number_format == "int4" and array.shape[1] % _INT4_BLOCK:
            raise explain(
                value.name, f"its rows are no whole blocks of {_INT4_BLOCK}", got=array.shape[1],
                remedy="use --embedding int8",
            )  # fmt: skip
        codes, scales, attributes = _narrowed(array, number_format, NUMPY_HALF[activations])
        kind = ir.DataType.INT4 if number_format == "int4" else ir.DataType.INT8
        half = HALF[activations]
        stored = initializer(model.graph, f"{value.name}.{number_format}", codes, kind)
        steps = initializer(model.graph, f"{value.name}.scale", scales, half)
        wide = ir.node(
            "DequantizeLinear", [stored, steps], attributes=attributes, name=f"{value.name}.dq"
        )
        wide.outputs[0].name, wide.outputs[0].shape = f"{value.name}.dq.out", value.shape
        wide.outputs[0].type = ir.TensorType(half)
        model.graph.insert_before(gathers[0], wide)
        for gather in gathers:
            gather.replace_input_with(0, wide.outputs[0])
        del model.graph.initializers[str(value.name)]
        final.add(wide)
        small = array.size // 2 if number_format == "int4" else array.size
        found.append(
            EmbeddingFormat(
                str(value.name), stage, number_format, 2 * array.size, small + scales.nbytes
            )
        )
    return tuple(found), frozenset(final)


def _tables(graph: ir.Graph) -> Iterator[tuple[ir.Value, list[ir.Node]]]:
    """Yield the float tables that only Gather reads, at positions that are inputs of the graph, with those nodes."""
    for value in list(graph.initializers.values()):
        users = list(value.consumers())
        if value.dtype != ir.DataType.FLOAT or value.shape is None or len(value.shape) != 2:
            continue
        if users and all(_looks_up(node, value) for node in users):
            yield value, sorted(users, key=list(graph).index)


def _looks_up(node: ir.Node, table: ir.Value) -> bool:
    if node.op_type != "Gather" or node.inputs[0] is not table:
        return False
    axis = node.attributes.get("axis")
    return (axis is None or axis.as_int() == 0) and _is_token_ids(node.inputs[1])


def _is_token_ids(value: ir.Value | None) -> bool:
    """Return whether integers come from an input of the graph, as they are or selected among."""
    if value is None or value.dtype != ir.DataType.INT64:
        return False
    if value.is_graph_input():
        return True
    node = value.producer()
    return node is not None and any(_is_token_ids(source) for source in node.inputs)


def _narrowed(
    table: NDArray[np.float32], number_format: str, half: np.dtype[np.generic]
) -> tuple[NDArray[np.generic], NDArray[np.generic], Mapping[str, int]]:
    """Return codes (rows, width), scales, and the attributes DequantizeLinear needs for them."""
    if number_format == "int8":
        codes, scales = integer_columns(table, half)
        return codes, scales, {"axis": 0}
    made = [
        quantize_weight(torch.tensor(table[first : first + _ROWS]), 4, _INT4_BLOCK)
        for first in range(0, len(table), _ROWS)
    ]
    scales = np.concatenate([part.scales.float().numpy() for part in made]).astype(half)
    codes = np.concatenate([part.codes.numpy() for part in made]).astype(ml_dtypes.int4)
    return codes, scales, {"axis": 1, "block_size": _INT4_BLOCK}
