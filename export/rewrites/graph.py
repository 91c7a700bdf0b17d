"""Questions about an ONNX graph and replacing one value by another; what all rewrites build on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Where", "And", "Or", "Min", "Max"})
CONTRIB = "com.microsoft"


def shape_of(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return the static shape of a value, or None where it is not known."""
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return tuple(int(size) for size in value.shape.numpy())


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """Return the content of a value stored in the graph, or None for a computed one."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """Return the number a one-element constant holds, or None."""
    content = constant(value) if value is not None and _size(value) == 1 else None
    return None if content is None else float(content.reshape(()))


def _size(value: ir.Value) -> int:
    return value.const_value.size if value.const_value is not None else -1


def made_by(value: ir.Value | None, *operators: str) -> ir.Node | None:
    """Return the node that computes a value if it is one of ``operators``."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in operators else None


def commuted(node: ir.Node) -> tuple[tuple[ir.Value | None, ir.Value | None], ...]:
    """Return both orders of the inputs of a commutative node."""
    a, b = node.inputs[:2]
    return ((a, b), (b, a))


class Editor:
    """Adds nodes before a place in a graph and puts their results in the place of old ones."""

    def __init__(self, model: ir.Model, before: ir.Node) -> None:
        self.graph = model.graph
        self.before = before

    def add(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        *,
        shape: Sequence[int] | None,
        dtype: ir.DataType = ir.DataType.FLOAT,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Return the first output of a new node."""
        node = ir.node(operator, list(inputs), attributes=attributes, domain=domain)
        value = node.outputs[0]
        value.type = ir.TensorType(dtype)
        if shape is not None:
            value.shape = ir.Shape(shape)
        self.graph.insert_before(self.before, node)
        return value

    def constant(self, name: str, content: NDArray[Any]) -> ir.Value:
        """Return an initializer with this content; equal names share one."""
        known = self.graph.initializers.get(name)
        if known is not None and known.const_value is not None:
            found = known.const_value.numpy()
            if found.dtype == content.dtype and np.array_equal(found, content):
                return known
            name = f"{name}.{len(self.graph.initializers)}"
        value = ir.Value(
            name=name, shape=ir.Shape(content.shape),
            type=ir.TensorType(ir.DataType.from_numpy(content.dtype)),
            const_value=ir.tensor(content, name=name),
        )  # fmt: skip
        self.graph.register_initializer(value)
        return value

    def reshape(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """Return ``value`` with another static shape, itself where it has that already."""
        if shape_of(value) == tuple(shape):
            return value
        target = self.constant(
            "shape." + "x".join(map(str, shape)), np.array(shape, dtype=np.int64)
        )
        return self.add(
            "Reshape", [value, target], shape=shape, dtype=value.dtype or ir.DataType.FLOAT
        )

    def transpose(self, value: ir.Value, permutation: Sequence[int]) -> ir.Value:
        """Return ``value`` with its axes permuted, itself for the identity."""
        if list(permutation) == sorted(permutation):
            return value
        shape = shape_of(value)
        assert shape is not None
        return self.add(
            "Transpose", [value], shape=[shape[axis] for axis in permutation],
            dtype=value.dtype or ir.DataType.FLOAT, perm=list(permutation),
        )  # fmt: skip

    def substitute(self, old: ir.Value, new: ir.Value) -> None:
        """Let every reader of ``old`` read ``new``; a graph output keeps its name."""
        substitute(self.graph, old, new)


def substitute(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let every reader of ``old`` read ``new``; a graph output keeps its name."""
    if old.is_graph_output():
        name = old.name
        old.name = f"{name}.before"
        if new.is_graph_output() or new.producer() is None:
            copy = ir.node("Identity", [new])
            copy.outputs[0].type, copy.outputs[0].shape = old.type, old.shape
            graph.append(copy)
            new_output = copy.outputs[0]
        else:
            new_output = new
        new_output.name = name
        if new_output.shape is None:
            new_output.shape = old.shape
        for index, output in enumerate(graph.outputs):
            if output is old:
                graph.outputs[index] = new_output
    ir.convenience.replace_all_uses_with(old, new)
