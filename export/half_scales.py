"""Store the block scales of ``MatMulNBits`` in half precision.

The kernel takes them in the type of its input, float32. The values are half-precision numbers
already, so the file holds those and a ``Cast``, which ONNX Runtime folds when it loads the graph.
Folding must not be switched off (``ORT_DISABLE_ALL``): with scales that are not constant,
ONNX Runtime 1.32's int8 kernel returns wrong numbers for more than one token.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

OPERATOR = "MatMulNBits"


def store_half_scales_(model: ir.Model) -> int:
    """Replace every float32 scale initializer by its half-precision form and a cast; return how many."""
    graph = model.graph
    changed = 0
    for node in [node for node in graph if node.op_type == OPERATOR]:
        scales = node.inputs[2]
        if scales is None or scales.const_value is None or scales.dtype != ir.DataType.FLOAT:
            continue
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
        node.replace_input_with(2, cast.outputs[0])
        assert scales.name is not None
        del graph.initializers[scales.name]
        graph.register_initializer(stored)
        changed += 1
    return changed
