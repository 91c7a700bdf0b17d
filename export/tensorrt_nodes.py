"""Writing typed nodes in front of a mark: what the lowering of every number format for TensorRT is made of."""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

HALF = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
NUMPY_HALF = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


def initializer(
    graph: ir.Graph, name: str, array: NDArray[np.generic], kind: ir.DataType
) -> ir.Value:
    """Store an array in the graph and return its value."""
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(kind),
        const_value=ir.tensor(array, dtype=kind, name=name),
    )  # fmt: skip
    graph.register_initializer(value)
    return value


class NodeWriter:
    """Writes nodes in front of one mark of a graph and puts their result in its place.

    ``name``: of the site's call, which all node names begin with; ``activations``: "fp16" or "bf16".
    ``nodes``: what was written, whose types are final.
    """

    def __init__(self, graph: ir.Graph, mark: ir.Node, name: str, activations: str) -> None:
        self._graph, self._mark, self._name = graph, mark, name
        self._half, self._numpy = HALF[activations], NUMPY_HALF[activations]
        self.nodes: set[ir.Node] = set()

    def _half_input(self, source: ir.Value) -> ir.Value:
        return self._add("Cast", [source], source.shape, self._half, "input", to=self._half.value)

    def _reshape(self, x: ir.Value, dims: Sequence[int], what: str) -> ir.Value:
        shape = initializer(
            self._graph, f"{self._name}.{what}_shape", np.array(dims, np.int64), ir.DataType.INT64
        )
        return self._add("Reshape", [x, shape], ir.Shape(tuple(dims)), self._half, what)

    def _replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let everything read ``new`` in the place of the mark's output; a graph output keeps its name."""
        if old.is_graph_output():
            name, old.name = old.name, f"{old.name}.mark"
            cast = ir.node("Cast", [new], attributes={"to": ir.DataType.FLOAT.value})
            cast.outputs[0].name, cast.outputs[0].shape = name, old.shape
            cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            self._graph.insert_before(self._mark, cast)
            self.nodes.add(cast)
            new = cast.outputs[0]
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        self._graph.remove(self._mark, safe=True)

    def _dequantize(
        self, site: str, codes: NDArray[np.generic], scales: NDArray[np.generic],
        kind: ir.DataType, *, axis: int, block_size: int = 0,
    ) -> ir.Value:  # fmt: skip
        stored = self._constant(site, "weight", np.ascontiguousarray(codes), kind)
        scale = self._constant(site, "weight_scale", np.ascontiguousarray(scales), self._half)
        attributes = {"axis": axis, "block_size": block_size} if block_size else {"axis": axis}
        if scales.ndim == 0:
            attributes = {}
        return self._add(
            "DequantizeLinear", [stored, scale], ir.Shape(codes.shape), self._half, "weight_dq",
            **attributes,
        )  # fmt: skip

    def _constant(
        self, site: str, what: str, array: NDArray[np.generic], kind: ir.DataType
    ) -> ir.Value:
        name = f"{site}.{what}"
        known = self._graph.initializers.get(name)
        return initializer(self._graph, name, array, kind) if known is None else known

    def _add(
        self, operator: str, inputs: list[ir.Value], shape: ir.Shape | None, kind: ir.DataType,
        what: str, **attributes: int,
    ) -> ir.Value:  # fmt: skip
        name = f"{self._name}.{what}" if what else self._name
        node = ir.node(operator, inputs, attributes=attributes, name=name)
        node.outputs[0].name, node.outputs[0].shape = f"{name}.out", shape
        node.outputs[0].type = ir.TensorType(kind)
        self._graph.insert_before(self._mark, node)
        self.nodes.add(node)
        return node.outputs[0]
