"""Lowering for ONNX Runtime on a CPU: a W4A8 site becomes one ``MatMulNBits`` node with int8 activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantvla.quantized_linear import QuantizedLinear
from quantvla.quantizer import pack_int4
from quantvla.runtime.errors import explain

OPERATOR = "com.microsoft::MatMulNBits"
INT8_ACTIVATIONS = 4  # the operator's accuracy_level: activations are quantized to int8 per block


class MatMulNBitsLinear(nn.Module):
    """Exports as ``MatMulNBits``: x (..., in) -> (..., out) float32.

    ``qweight``: (out, in / block, block / 2) uint8, two codes with offset 8 to a byte, low nibble
    first; ``scales``: (out, in / block) float32 holding half-precision values.
    """

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        weight = linear.quantized
        out_features, in_features = weight.codes.shape
        self.out_features, self.in_features, self.block = out_features, in_features, weight.block
        packed = pack_int4(weight.codes)
        self.qweight: Tensor
        self.scales: Tensor
        self.bias: Tensor | None
        self.register_buffer("qweight", packed.view(out_features, -1, weight.block // 2))
        self.register_buffer("scales", weight.scales.float())
        self.register_buffer("bias", linear.bias)
        self.weight = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        inputs: list[Tensor | None] = [x, self.qweight, self.scales]
        if self.bias is not None:
            inputs += [None, None, self.bias]
        out: Tensor = torch.onnx.ops.symbolic(
            OPERATOR,
            inputs,
            attrs={
                "K": self.in_features, "N": self.out_features, "bits": 4, "block_size": self.block,
                "accuracy_level": INT8_ACTIVATIONS,
            },
            dtype=torch.float32, shape=(*x.shape[:-1], self.out_features), version=1,
        )  # fmt: skip
        return out


def lower(site: str, linear: QuantizedLinear) -> nn.Module:
    """Return the module that exports as this target's kernel for the site."""
    if linear.quantized.bits != 4:
        raise explain(
            site,
            "no kernel on target 'cpu' for weights of this width",
            got=linear.quantized.bits,
            remedy="plan it as w4a8 or float",
        )
    return MatMulNBitsLinear(linear)
