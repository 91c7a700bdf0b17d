"""Tables in the place of weights that only see the time.

The repeated stage runs at times known in advance. Linears of the time alone, such as those that
modulate norms, are evaluated once for each of them here and leave the graph; a table indexed by
the step stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnxruntime import InferenceSession, SessionOptions

from quantvla.export.rewrites.graph import Editor, constant

_WEIGHTED = frozenset({"MatMul", "Gemm", "MatMulNBits", "MatMulInteger"})


@dataclass(frozen=True)
class Tabulated:
    """How many nodes became tables, how many bytes of weights left the graph and how many came."""

    nodes: int
    removed_bytes: int
    table_bytes: int


def tabulate_time_(model: ir.Model, time: str, timesteps: Sequence[float]) -> Tabulated:
    """Replace what the input ``time`` alone decides by tables over ``timesteps``.

    Nothing happens where no weights would leave the graph, which then is right for any time.
    """
    given = next((value for value in model.graph.inputs if value.name == time), None)
    nodes = nodes_of_time(model, given) if given is not None else []
    if given is None or not any(node.op_type in _WEIGHTED for node in nodes):
        return Tabulated(0, 0, 0)
    inside = set(nodes)
    frontier = [
        output
        for node in nodes
        for output in node.outputs
        if any(user not in inside for user in output.consumers())
    ]
    before = _initializer_bytes(model)
    rows = _evaluate(model, given, nodes, frontier, timesteps)
    index = _step_index(model, given, timesteps)
    tables = 0
    for value, content in zip(frontier, rows, strict=True):
        node = value.producer()
        assert node is not None
        editor = Editor(model, node)
        table = editor.constant(f"{value.name}.table", content)
        row = editor.add(
            "Gather", [table, index], shape=content.shape[1:],
            dtype=ir.DataType.from_numpy(content.dtype), axis=0,
        )  # fmt: skip
        editor.substitute(value, row)
        tables += content.nbytes
    for node in reversed(nodes):
        model.graph.remove(node, safe=True)
    _drop_unread(model)
    return Tabulated(len(nodes), before + tables - _initializer_bytes(model), tables)


def nodes_of_time(model: ir.Model, given: ir.Value) -> list[ir.Node]:
    """Return, in order, the nodes that depend on the time and otherwise on constants only."""
    known, nodes = {given}, []
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None]
        if any(value in known for value in inputs) and all(
            value in known or constant(value) is not None for value in inputs
        ):
            known.update(node.outputs)
            nodes.append(node)
    return nodes


def _evaluate(
    model: ir.Model, given: ir.Value, nodes: Sequence[ir.Node], frontier: Sequence[ir.Value],
    timesteps: Sequence[float],
) -> list[NDArray[np.generic]]:  # fmt: skip
    """Return the frontier's values at every time, stacked along a new first axis."""
    part = _cut_out(model, given, nodes, frontier)
    options = SessionOptions()
    options.log_severity_level = 3
    session = InferenceSession(part.SerializeToString(), options, ["CPUExecutionProvider"])
    runs = [session.run(None, {str(given.name): np.array([t], np.float32)}) for t in timesteps]
    return [np.stack(column) for column in zip(*runs, strict=True)]


def _cut_out(
    model: ir.Model, given: ir.Value, nodes: Sequence[ir.Node], frontier: Sequence[ir.Value]
) -> onnx.ModelProto:
    """Return a model of these nodes alone, from the time to the frontier."""
    copies: dict[ir.Value, ir.Value] = {
        given: ir.Value(name=given.name, type=given.type, shape=given.shape)
    }
    initializers, made = [], []
    for node in nodes:
        for value in node.inputs:
            if value is not None and value not in copies:
                assert value.const_value is not None
                copies[value] = ir.Value(
                    name=value.name, type=value.type, shape=value.shape,
                    const_value=value.const_value,
                )  # fmt: skip
                initializers.append(copies[value])
        copy = ir.Node(
            node.domain, node.op_type,
            [copies[value] if value is not None else None for value in node.inputs],
            list(node.attributes.values()), overload=node.overload, num_outputs=len(node.outputs),
        )  # fmt: skip
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.type, new.shape = old.name, old.type, old.shape
            copies[old] = new
        made.append(copy)
    graph = ir.Graph(
        [copies[given]], [copies[value] for value in frontier], nodes=made,
        initializers=initializers, opset_imports=dict(model.opset_imports), name="of_time",
    )  # fmt: skip
    return ir.to_proto(ir.Model(graph, ir_version=model.ir_version))


def _step_index(model: ir.Model, given: ir.Value, timesteps: Sequence[float]) -> ir.Value:
    """Return the position of the time in ``timesteps``: of the nearest one."""
    editor = Editor(model, next(iter(model.graph)))
    steps = len(timesteps)
    times = editor.constant(f"{given.name}.table", np.array([timesteps], np.float32))
    distance = editor.add("Sub", [times, given], shape=[1, steps])
    size = editor.add("Abs", [distance], shape=[1, steps])
    # of one row: TensorRT has no ArgMin of a vector
    nearest = editor.add(
        "ArgMin", [size], shape=[1], dtype=ir.DataType.INT64, axis=1, keepdims=0
    )  # fmt: skip
    return editor.reshape(nearest, ())


def _drop_unread(model: ir.Model) -> None:
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]


def _initializer_bytes(model: ir.Model) -> int:
    return sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
