"""Lowering for ONNX Runtime on a CPU: an integer site becomes one node.

Weights with block scales become ``MatMulNBits`` (4 or 8 bits), its inputs int8 or float; weights with
one scale a row and inputs with one scale a tensor become ``DynamicQuantizeMatMul``, plain 8-bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quantvla.export.kernels import (
    DYNAMIC_MATMUL,
    FLOAT_ACCURACY_LEVEL,
    INT8_ACCURACY_LEVEL,
    MATMUL_NBITS,
    operator_block,
)
from quantvla.quantized_linear import QuantizedLinear
from quantvla.quantizer import pack_codes
from quantvla.runtime.errors import explain
from quantvla.schemes import INTEGER_SCHEMES

DOMAIN = "com.microsoft"
Attributes = dict[  # as torch declares them
    str, int | float | str | bool | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bool]
]


class _KernelLinear(nn.Module):
    """A site's constants, and its node: x (..., in) -> (..., out) float32."""

    def __init__(self, linear: QuantizedLinear, qweight: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.quantized.codes.shape
        self.qweight: Tensor
        self.scales: Tensor
        self.bias: Tensor | None
        self.register_buffer("qweight", qweight)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", linear.bias)
        self.weight = torch.empty(0)

    def node(self, operator: str, x: Tensor, bias_at: int, attributes: Attributes) -> Tensor:
        """Return the output of the operator on x, the weight, the scales and, at its place, the bias."""
        inputs: Sequence[Tensor | None] = [x, self.qweight, self.scales]
        if self.bias is not None:
            inputs = [*inputs, *[None] * (bias_at - len(inputs)), self.bias]
        out: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{operator}",
            inputs,
            attrs=attributes,
            dtype=torch.float32,
            shape=(*x.shape[:-1], self.out_features),
            version=1,
        )
        return out


class MatMulNBitsLinear(_KernelLinear):
    """Exports as ``MatMulNBits``.

    The operator's blocks are powers of two up to 256; a larger block of the scheme is several of its
    blocks with the same scale, and its inputs are then rounded per smaller block, that is finer.

    ``qweight``: (out, in / block, bytes of a block) uint8, see `pack_codes`; ``scales``:
    (out, in / block) float32 holding half-precision values.
    """

    def __init__(self, linear: QuantizedLinear) -> None:
        weight = linear.quantized
        packed = pack_codes(weight.codes, weight.bits)
        block = operator_block(weight.block)
        scales = weight.scales.float().repeat_interleave(weight.block // block, dim=1)
        super().__init__(linear, packed.view(packed.shape[0], scales.shape[1], -1), scales)
        self._attributes: Attributes = {
            "K": self.in_features, "N": self.out_features, "bits": weight.bits,
            "block_size": block,
            "accuracy_level": FLOAT_ACCURACY_LEVEL if weight.inputs == "float" else INT8_ACCURACY_LEVEL,
        }  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.node(MATMUL_NBITS.operator, x, MATMUL_NBITS.bias, self._attributes)


class DynamicMatMulLinear(_KernelLinear):
    """Exports as ``DynamicQuantizeMatMul``.

    ``qweight``: (in, out) int8; ``scales``: (out,) float32 holding half-precision values.
    """

    def __init__(self, linear: QuantizedLinear) -> None:
        weight = linear.quantized
        super().__init__(linear, weight.codes.t().contiguous(), weight.scales.float().view(-1))

    def forward(self, x: Tensor) -> Tensor:
        return self.node(DYNAMIC_MATMUL.operator, x, DYNAMIC_MATMUL.bias, {})


def lower(site: str, linear: QuantizedLinear) -> nn.Module:
    """Return the module that exports as this target's kernel for the site."""
    bits, inputs = linear.quantized.bits, linear.quantized.inputs
    if inputs == "int8_static":
        raise explain(
            site,
            "its activation scales are fixed per input channel, and a scale that varies along the sum "
            "cannot leave an integer dot product, so that it has no kernel on any target",
            remedy="run the quantized checkpoint in torch (quantvla eval, quantvla compare), or use a "
            "recipe with w4a8",
        )
    if inputs == "uint8_tensor" and bits == 8:
        return DynamicMatMulLinear(linear)
    if inputs != "uint8_tensor" and bits in (4, 8) and operator_block(linear.quantized.block) >= 16:
        return MatMulNBitsLinear(linear)
    raise explain(
        site,
        "no kernel on target 'cpu' for weights of this width",
        got=f"{bits} with {inputs} inputs",
        remedy=f"plan it as {', '.join(INTEGER_SCHEMES)} or float",
    )
