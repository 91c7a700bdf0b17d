"""A linear layer with an integer weight, in the reference arithmetic."""

from __future__ import annotations

from dataclasses import replace

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


def integer_weights(policy: nn.Module) -> dict[str, QuantizedWeight]:
    """Return the weights of all integer linears in place in a policy, by site."""
    return {
        name: module.quantized
        for name, module in policy.named_modules()
        if isinstance(module, QuantizedLinear)
    }


class SimulatedLinear(nn.Module):
    """The same numbers as `QuantizedLinear` up to float32 rounding, in one float product: for calibration.

    ``kept``: the float weight stays in memory; else every call makes it of the integers.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, *, kept: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.dequantize() if kept else torch.empty(0), False)
        self.bias = bias
        self.out_features, self.in_features = weight.codes.shape
        self._codes = None if kept else weight
        self._block, self._inputs, self._static = weight.block, weight.inputs, weight.static

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self._codes is None else self._codes.dequantize()
        rows = self._represented(x.reshape(-1, x.shape[-1]))
        return functional.linear(rows, weight, self.bias).view(*x.shape[:-1], -1)

    def _represented(self, rows: Tensor) -> Tensor:
        if self._static is not None:
            return self._static.represented(rows)
        return represented_input(rows, self._block, self._inputs)


class TunableLinear(SimulatedLinear):
    """A `SimulatedLinear` whose block scales are its one trainable parameter; the codes stay.

    ``ratio`` (out, in / block) multiplies the scales. Rounding of the input passes gradients straight through.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self._untuned = weight
        self.ratio = nn.Parameter(torch.ones(weight.scales.shape))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        represented = rows + (self._represented(rows.detach()) - rows).detach()
        blocks = self.weight.view(*self.ratio.shape, self._block) * self.ratio[..., None]
        return functional.linear(represented, blocks.view_as(self.weight), self.bias).view(
            *x.shape[:-1], -1
        )

    def tuned(self) -> QuantizedWeight:
        """Return the integers with the scales as they are now, in half precision."""
        scales = (self._untuned.scales.float() * self.ratio.detach()).half()
        return replace(self._untuned, scales=scales)
