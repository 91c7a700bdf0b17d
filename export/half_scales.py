"""Store the scales of integer kernels in half precision.

The kernels take them in the type of their input, float32. The values are half-precision numbers
already, so the file holds those and a ``Cast``, which ONNX Runtime folds when it loads the graph.
Folding must not be switched off (``ORT_DISABLE_ALL``): with scales that are not constant,
ONNX Runtime 1.32's int8 ``MatMulNBits`` returns wrong numbers for more than one token.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quantvla.export.kernels import KERNELS


def store_half_scales_(model: ir.Model) -> int:
    """Replace every float32 scale initializer by its half-precision form and a cast.

    Returns how many kernels read them.
    """
    graph = model.graph
    casts: dict[str, ir.Value] = {}  # the exporter lets equal constants be one
    changed = 0
    for node in [node for node in graph if node.op_type in KERNELS]:
        index = KERNELS[node.op_type].scales
        scales = node.inputs[index]
        if scales is None or scales.const_value is None or scales.dtype != ir.DataType.FLOAT:
            continue
        assert scales.name is not None
        if scales.name not in casts:
            casts[scales.name] = _cast_from_half(graph, node, scales)
        node.replace_input_with(index, casts[scales.name])
        changed += 1
    return changed


def _cast_from_half(graph: ir.Graph, node: ir.Node, scales: ir.Value) -> ir.Value:
    """Put the half-precision form of ``scales`` in its place; return its cast, computed before ``node``."""
    assert scales.const_value is not None and scales.name is not None
    values = scales.const_value.numpy()
    half = values.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), values):
        raise ValueError(f"{scales.name}: scales are not half-precision numbers")
    stored = ir.Value(
        name=scales.name, shape=scales.shape, type=ir.TensorType(ir.DataType.FLOAT16),
        const_value=ir.tensor(half, name=scales.name),
    )  # fmt: skip
    cast = ir.node("Cast", [stored], attributes={"to": ir.DataType.FLOAT.value})
    cast.outputs[0].name = f"{scales.name}.float"
    cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), scales.shape
    graph.insert_before(node, cast)
    del graph.initializers[scales.name]
    graph.register_initializer(stored)
    return cast.outputs[0]
