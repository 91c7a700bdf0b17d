"""From a stage's graph of ONNX Runtime's own operators to one of the project's (`runtime/kernels`), same weights file.

- ``MatMulNBits`` on panels becomes ``quantvla.IntegerLinear``, with the activation that follows it and the
  tensor that is then added or multiplied;
- ``MultiHeadAttention`` becomes ``quantvla.Attention``, whose products are bfloat16 where the processor has them.

The arithmetic of a linear layer is that of its scheme; see `quantvla.quantizer.integer_linear`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

from quantvla.export.kernels import (
    ATTENTION,
    INTEGER_LINEAR,
    MATMUL_NBITS,
    NATIVE_DOMAIN,
    Activation,
    Combine,
    back_to_file,
)
from quantvla.export.rewrites.graph import Editor, commuted, shape_of

_ATTENTION_WIDTH = 32  # a head is a multiple of this wide
_LAYOUT = frozenset({"Reshape", "Transpose", "Expand", "Cast"})


def derive_native(stock: Path, output: Path) -> tuple[int, int]:
    """Write the graph of own operators for the graph at ``stock``, in the same directory; returns how many
    linears and attentions it has.
    """
    model = ir.load(stock)
    linears = fuse_linears_(model)
    attentions = fuse_attention_(model)
    model.opset_imports[NATIVE_DOMAIN] = 1
    RemoveUnusedNodesPass()(model)
    NameFixPass()(model)
    RemoveUnusedOpsetsPass()(model)
    ir.save(model, output)
    return linears, attentions


@dataclass
class _Epilogue:
    """What is fused behind a linear, and the value it ends in."""

    result: ir.Value
    activation: Activation = Activation.NONE
    combine: Combine = Combine.NONE
    other: ir.Value | None = None


def fuse_linears_(model: ir.Model) -> int:
    """Replace every ``MatMulNBits`` whose weight is stored as panels; returns how many."""
    changed = 0
    for node in [node for node in model.graph if node.op_type == MATMUL_NBITS.operator]:
        codes = _stored(node.inputs[MATMUL_NBITS.weight])
        scales = _stored(node.inputs[MATMUL_NBITS.scales])
        if codes is None or scales is None or scales.dtype != ir.DataType.FLOAT16:
            continue
        bias = node.inputs[MATMUL_NBITS.bias] if len(node.inputs) > MATMUL_NBITS.bias else None
        epilogue = _epilogue(node.outputs[0])
        shape = shape_of(scales)
        last = epilogue.result.producer()
        assert shape is not None and last is not None
        inputs = [node.inputs[0], codes, scales, bias, epilogue.other]
        while inputs[-1] is None:
            inputs.pop()
        editor = Editor(model, last)
        result = editor.add(
            INTEGER_LINEAR.operator, inputs, shape=shape_of(epilogue.result), domain=NATIVE_DOMAIN,
            bits=node.attributes["bits"].as_int(), block=node.attributes["K"].as_int() // shape[1],
            activation=epilogue.activation.value, combine=epilogue.combine.value,
        )  # fmt: skip
        editor.substitute(epilogue.result, result)
        changed += 1
    return changed


def _stored(value: ir.Value | None) -> ir.Value | None:
    """Return the constant that layout nodes turn into ``value``, None if it is not stored as panels."""
    found, nodes = back_to_file(value)
    operators = {node.op_type for node in nodes}
    if (
        found is None
        or found.const_value is None
        or not operators - {"Cast"}
        or operators - _LAYOUT
    ):
        return None
    return found


def _epilogue(value: ir.Value) -> _Epilogue:
    found = _Epilogue(value)
    if (gelu := _only_reader(value, "Gelu")) is not None:
        approximate = gelu.attributes.get("approximate")
        if approximate is not None and approximate.as_string() == "tanh":
            found = _Epilogue(gelu.outputs[0], Activation.GELU_TANH)
    elif (silu := _silu(value)) is not None:
        found = _Epilogue(silu, Activation.SILU)
    for operator, combine in (("Add", Combine.ADD), ("Mul", Combine.MULTIPLY)):
        node = _only_reader(found.result, operator)
        if node is None:
            continue
        for mine, other in commuted(node):
            same = other is not None and shape_of(other) == shape_of(mine) == shape_of(
                node.outputs[0]
            )
            if mine is found.result and other is not mine and same:
                return _Epilogue(node.outputs[0], found.activation, combine, other)
    return found


def _only_used_once(value: ir.Value) -> bool:
    """Whether exactly one input of one node reads a value, and the graph does not return it."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def _only_reader(value: ir.Value, operator: str) -> ir.Node | None:
    if not _only_used_once(value):
        return None
    (node,) = value.consumers()
    return node if node.op_type == operator else None


def _silu(value: ir.Value) -> ir.Value | None:
    """Return ``value * Sigmoid(value)`` if that is all that reads ``value``."""
    readers = value.consumers()
    if value.is_graph_output() or len(readers) != 2:
        return None
    sigmoid = next((node for node in readers if node.op_type == "Sigmoid"), None)
    product = next((node for node in readers if node.op_type == "Mul"), None)
    if sigmoid is None or product is None or not _only_used_once(sigmoid.outputs[0]):
        return None
    return product.outputs[0] if sigmoid.outputs[0] in product.inputs else None


def fuse_attention_(model: ir.Model) -> int:
    """Replace every ``MultiHeadAttention`` that the own operator can compute; returns how many."""
    changed = 0
    for node in [node for node in model.graph if node.op_type == "MultiHeadAttention"]:
        q, k, v = node.inputs[:3]
        shapes = [shape_of(value) for value in (q, k, v)]
        heads = node.attributes["num_heads"].as_int()
        if any(shape is None or len(shape) != 3 for shape in shapes) or shapes[1] != shapes[2]:
            continue
        width = shapes[0][2] // heads  # type: ignore[index]
        bias = node.inputs[5] if len(node.inputs) > 5 else None
        others = [value for index, value in enumerate(node.inputs[3:]) if index != 2]
        if width % _ATTENTION_WIDTH or any(value is not None for value in others):
            continue
        editor = Editor(model, node)
        result = editor.add(
            ATTENTION, [q, k, v, bias] if bias is not None else [q, k, v],
            shape=shape_of(node.outputs[0]), domain=NATIVE_DOMAIN, num_heads=heads,
            scale=node.attributes["scale"].as_float(),
        )  # fmt: skip
        editor.substitute(node.outputs[0], result)
        changed += 1
    return changed
