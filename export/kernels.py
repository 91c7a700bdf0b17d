"""The operators that integer linears become: where each has its weight, scales and bias."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kernel:
    """One operator of the domain ``com.microsoft``; input 0 is the activation.

    ``weight``, ``scales`` and ``bias`` are the positions of these inputs.
    """

    operator: str
    weight: int
    scales: int
    bias: int


MATMUL_NBITS = Kernel("MatMulNBits", weight=1, scales=2, bias=5)
DYNAMIC_MATMUL = Kernel("DynamicQuantizeMatMul", weight=1, scales=2, bias=4)
KERNELS = {kernel.operator: kernel for kernel in (MATMUL_NBITS, DYNAMIC_MATMUL)}
INT8_ACCURACY_LEVEL = 4  # MatMulNBits: inputs are quantized to int8 per token and block
FLOAT_ACCURACY_LEVEL = 1  # MatMulNBits: inputs stay float32
