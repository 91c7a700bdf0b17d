"""A linear layer with an integer weight, in the reference arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantvla.quantizer import QuantizedWeight, integer_linear, represented_input


class QuantizedLinear(nn.Module):
    """Stands in a policy for an `nn.Linear`: x (..., in) -> (..., out), integers inside."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.quantized = weight
        self.bias = bias
        self.out_features, self.in_features = weight.codes.shape
        # lerobot asks a projection for its weight's dtype before calling it
        self.weight = torch.empty(0, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return integer_linear(x, self.quantized, self.bias)


class SimulatedLinear(nn.Module):
    """The same numbers as `QuantizedLinear` up to float32 rounding, in one float product: for calibration."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
        self.bias = bias
        self.out_features, self.in_features = weight.codes.shape
        self._block, self._inputs, self._static = weight.block, weight.inputs, weight.static

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self._static is not None:
            rows = self._static.represented(rows)
        else:
            rows = represented_input(rows, self._block, self._inputs)
        return functional.linear(rows, self.weight, self.bias).view(*x.shape[:-1], -1)
