"""The operators that integer linears become: where each has its weight, scales and bias."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import onnx_ir as ir


@dataclass(frozen=True)
class Kernel:
    """One operator; input 0 is the activation.

    ``weight``, ``scales`` and ``bias`` are the positions of these inputs.
    """

    operator: str
    weight: int
    scales: int
    bias: int


MATMUL_NBITS = Kernel("MatMulNBits", weight=1, scales=2, bias=5)
DYNAMIC_MATMUL = Kernel("DynamicQuantizeMatMul", weight=1, scales=2, bias=4)
INT8_ACCURACY_LEVEL = 4  # MatMulNBits: inputs are quantized to int8 per token and block
FLOAT_ACCURACY_LEVEL = 1  # MatMulNBits: inputs stay float32


# The project's own operators (runtime/kernels), domain "quantvla".
NATIVE_DOMAIN = "quantvla"
INTEGER_LINEAR = Kernel("IntegerLinear", weight=1, scales=2, bias=3)
KERNELS = {kernel.operator: kernel for kernel in (MATMUL_NBITS, DYNAMIC_MATMUL, INTEGER_LINEAR)}
ATTENTION = "Attention"
OTHER_INPUT = 4  # of IntegerLinear: what `Combine` adds or multiplies


class Activation(Enum):
    """What ``IntegerLinear`` applies to its sums; numbered as in runtime/kernels/linear.h."""

    NONE = 0
    GELU_TANH = 1
    SILU = 2


class Combine(Enum):
    """How ``IntegerLinear`` takes a last tensor in; numbered as in runtime/kernels/linear.h."""

    NONE = 0
    ADD = 1
    MULTIPLY = 2


def operator_block(block: int) -> int:
    """Return the largest block that ``MatMulNBits`` takes and that divides ``block``."""
    return min(block & -block, 256)


def back_to_file(value: ir.Value | None) -> tuple[ir.Value | None, list[ir.Node]]:
    """Return the stored value that nodes lay out as ``value``, and these nodes, the last one first.

    The first part is no constant where ``value`` is computed from an input.
    """
    nodes = []
    while value is not None and value.const_value is None and (made := value.producer()):
        nodes.append(made)
        value = made.inputs[0]
    return value, nodes


def site_name(node: ir.Node) -> str:
    """Return the site an integer kernel stands for, from the name of its stored weight."""
    value, _ = back_to_file(node.inputs[KERNELS[node.op_type].weight])
    name = (value.name if value is not None else None) or ""
    return name.removeprefix("policy.").removesuffix(".qweight")
