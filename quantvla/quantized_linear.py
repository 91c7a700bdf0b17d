"""A linear layer with an integer weight, in the reference arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantvla.quantizer import QuantizedWeight, integer_linear


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
