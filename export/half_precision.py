"""Explicit half precision for strongly typed networks: which part of a graph is computed in which type.

Products, convolutions and layer normalization (whose statistics TensorRT keeps in fp32) take half
precision. Sums of squares, roots, exponentials, softmax and the angles of position embeddings are
computed in fp32, and so is whatever is elementwise between them and the next product. Data movement
keeps the type of what it moves. Casts stand in the graph where types meet, so nothing is left to the
builder's choice.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from quantvla.export.tensorrt_nodes import HALF, NUMPY_HALF

FLOAT = ir.DataType.FLOAT
PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "LayerNormalization", "Gelu"})
SENSITIVE = frozenset(
    {
        "Pow", "ReduceMean", "ReduceSum", "ReduceMax", "Sqrt", "Reciprocal", "Exp", "Log", "Erf",
        "Sin", "Cos", "Softmax", "CumSum", "Softplus",
    }
)  # fmt: skip
MOVEMENT = frozenset(
    {
        "Transpose", "Reshape", "Concat", "Split", "Slice", "Expand", "ScatterND", "ScatterElements",
        "Gather", "GatherND", "GatherElements", "Unsqueeze", "Squeeze", "Identity", "Flatten", "Tile", "Pad",
    }
)  # fmt: skip
_LARGE = 1 << 14  # elements from which a table that is only looked up is stored in half precision


def narrow_doubles_(model: ir.Model) -> None:
    """Compute in float32 what the graph computes in float64 (angles of time embeddings): TensorRT has no float64."""
    graph, double = model.graph, ir.DataType.DOUBLE
    for value in list(graph.initializers.values()):
        if value.dtype == double and value.const_value is not None:
            value.const_value = ir.tensor(
                np.asarray(value.const_value.numpy(), np.float32), name=value.name
            )
            value.type = ir.TensorType(FLOAT)
    for node in graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == double.value:
            node.attributes["to"] = ir.AttrInt64("to", FLOAT.value)
        for output in node.outputs:
            if output.dtype == double:
                output.type = ir.TensorType(FLOAT)


def to_half_(
    model: ir.Model, activations: str, final: Collection[ir.Node], half_outputs: Collection[str]
) -> None:
    """Give every float value of the graph its type; graph inputs and outputs stay float32.

    Nodes in ``final`` are typed already. Inputs and outputs named in ``half_outputs`` become half
    precision: tensors that only travel from stage to stage.
    """
    _Typing(model.graph, activations, final, half_outputs).run()


class _Typing:
    def __init__(
        self,
        graph: ir.Graph,
        activations: str,
        final: Collection[ir.Node],
        half_io: Collection[str],
    ) -> None:
        self._graph, self._final, self._half_io = graph, set(final), set(half_io)
        self._half, self._numpy = HALF[activations], NUMPY_HALF[activations]
        self._casts: dict[tuple[int, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        for value in self._graph.inputs:
            if value.name in self._half_io and value.dtype == FLOAT:
                value.type = ir.TensorType(self._half)
        for node in list(self._graph):
            if node in self._final:
                if node.op_type == "Cast" and node.inputs[0] is not None:
                    self._drop_needless(node)
            else:
                self._type(node)
        self._outputs()
        self._remove_unused()

    def _drop_needless(self, cast: ir.Node) -> None:
        source = cast.inputs[0]
        assert source is not None
        if source.dtype == cast.outputs[0].dtype and not cast.outputs[0].is_graph_output():
            ir.convenience.replace_all_uses_with(cast.outputs[0], source)
            self._graph.remove(cast, safe=True)

    def _type(self, node: ir.Node) -> None:
        if node.op_type == "Cast":
            self._retype_cast(node)
            return
        floats = [i for i, v in enumerate(node.inputs) if v is not None and self._is_float(v)]
        if not floats:
            return
        wanted = self._wanted(node, floats)
        for index in floats:
            value = node.inputs[index]
            assert value is not None
            node.replace_input_with(index, self._as(value, wanted, node))
        for output in node.outputs:
            if output.dtype == FLOAT or output.dtype == self._half:
                output.type = ir.TensorType(wanted)

    def _retype_cast(self, node: ir.Node) -> None:
        """Keep a cast to fp32 of a number that is none yet (tokens, masks) as it is: it starts a float part."""
        source = node.inputs[0]
        if source is not None and source.dtype == node.outputs[0].dtype:
            ir.convenience.replace_all_uses_with(node.outputs[0], source)
            self._graph.remove(node, safe=True)

    def _is_float(self, value: ir.Value) -> bool:
        return value.dtype in (FLOAT, self._half)

    def _wanted(self, node: ir.Node, floats: list[int]) -> ir.DataType:
        if node.op_type in PRODUCTS:
            return self._half
        if node.op_type in SENSITIVE:
            return FLOAT
        values = [v for i in floats if (v := node.inputs[i]) is not None]
        moving = [v for v in values if v.const_value is None]
        if not moving:
            large = max(int(np.prod(v.shape.numpy())) for v in values if v.shape is not None)
            return self._half if node.op_type in MOVEMENT and large >= _LARGE else FLOAT
        kinds = {v.dtype for v in moving}
        if node.op_type in MOVEMENT:
            return self._half if self._half in kinds else FLOAT
        return FLOAT if FLOAT in kinds else self._half

    def _as(self, value: ir.Value, kind: ir.DataType, user: ir.Node) -> ir.Value:
        """Return ``value`` in a type: itself, a converted constant, or a cast in front of ``user``."""
        if value.dtype == kind:
            return value
        key = (id(value), kind)
        if key not in self._casts:
            self._casts[key] = (
                self._converted(value, kind)
                if value.const_value is not None
                else self._cast(value, kind, user)
            )
        return self._casts[key]

    def _converted(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        assert value.const_value is not None
        array = np.asarray(value.const_value.numpy(), np.float32)
        if kind == self._half:
            top = float(np.finfo(np.float16).max) if self._numpy == np.float16 else 3.3e38
            # masks add the most negative float32, which would become an infinity and softmax a NaN
            array = np.clip(array, -top, top).astype(self._numpy)
        name = f"{value.name}.{kind.name.lower()}"
        made = ir.Value(
            name=name, shape=value.shape, type=ir.TensorType(kind),
            const_value=ir.tensor(array, dtype=kind, name=name),
        )  # fmt: skip
        self._graph.register_initializer(made)
        return made

    def _cast(self, value: ir.Value, kind: ir.DataType, user: ir.Node) -> ir.Value:
        node = ir.node(
            "Cast", [value], attributes={"to": kind.value}, name=f"{value.name}.to_{kind.name.lower()}"
        )  # fmt: skip
        node.outputs[0].name = f"{value.name}.{kind.name.lower()}"
        node.outputs[0].shape, node.outputs[0].type = value.shape, ir.TensorType(kind)
        producer = value.producer()
        if producer is not None:
            self._graph.insert_after(producer, node)
        else:
            self._graph.insert_before(self._graph[0], node)
        return node.outputs[0]

    def _outputs(self) -> None:
        for index, value in enumerate(list(self._graph.outputs)):
            wanted = self._half if value.name in self._half_io else FLOAT
            if not self._is_float(value) or value.dtype == wanted:
                continue
            name = value.name
            value.name = f"{name}.inner"
            producer = value.producer()
            assert producer is not None
            node = ir.node("Cast", [value], attributes={"to": wanted.value}, name=f"{name}.cast")
            node.outputs[0].name, node.outputs[0].shape = name, value.shape
            node.outputs[0].type = ir.TensorType(wanted)
            self._graph.insert_after(producer, node)
            self._graph.outputs[index] = node.outputs[0]

    def _remove_unused(self) -> None:
        for name, value in list(self._graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self._graph.initializers[name]
