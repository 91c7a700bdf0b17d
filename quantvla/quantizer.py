"""The reference integer arithmetic: every quantizer, packer and kernel is checked against this file.

Weights are symmetric, block-wise along the input dimension. Activations are symmetric int8 per
token and block, which is what ONNX Runtime's ``MatMulNBits`` computes with ``accuracy_level=4``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

INT8_MAX = 127
_SCALE_CANDIDATES = 48
_SMALLEST_RATIO = 0.5
_REFITS = 2
_TINY = 2.0**-24  # the smallest positive half-precision number


@dataclass(frozen=True)
class QuantizedWeight:
    """Integer weight of one linear.

    ``codes``: (out, in) int8 in [-2^(bits-1), 2^(bits-1) - 1]; ``scales``: (out, in / block)
    float16. The weight they stand for is ``codes * scales`` with each scale spread over its block.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    block: int

    def dequantize(self) -> Tensor:
        """Return the represented weight: (out, in) float32."""
        rows, columns = self.codes.shape
        blocks = self.codes.view(rows, columns // self.block, self.block).float()
        return (blocks * self.scales.float()[..., None]).view(rows, columns)


def quantize_weight(
    weight: Tensor, bits: int, block: int, importance: Tensor | None = None
) -> QuantizedWeight:
    """Round ``weight`` (out, in) to integers with the block scales of least weighted error.

    For each block the scale is searched among fractions of the one that just covers the largest
    magnitude, then refitted to the codes by least squares; the error of a candidate is ``sum_k importance_k (w_k - s q_k)^2`` with
    ``importance``: (in,) the second moment E[x_k^2] of the input channel (all ones when absent).
    Scales are rounded to half precision before the codes are computed, so the stored pair is exact.
    """
    rows, columns = weight.shape
    high = 2 ** (bits - 1) - 1
    blocks = weight.detach().float().view(rows, columns // block, block)
    importance = torch.ones(columns) if importance is None else importance.float()
    per_block = importance.view(1, columns // block, block)
    largest = blocks.abs().amax(-1)
    search = _ScaleSearch(blocks, per_block, high)
    for ratio in torch.linspace(1.0, _SMALLEST_RATIO, _SCALE_CANDIDATES).tolist():
        search.consider(largest * ratio / high)
    for _ in range(_REFITS):
        search.consider(search.refit())
    codes = _round_to(blocks, search.scale, high).to(torch.int8).view(rows, columns)
    return QuantizedWeight(codes, search.scale.half(), bits, block)


class _ScaleSearch:
    """The best scale of each block among those considered."""

    def __init__(self, blocks: Tensor, importance: Tensor, high: int) -> None:
        self._blocks, self._importance, self._high = blocks, importance, high
        self.scale = torch.ones(blocks.shape[:-1])
        self._error = torch.full(blocks.shape[:-1], torch.inf)

    def consider(self, scale: Tensor) -> None:
        """Keep ``scale`` (out, blocks) where its error is smaller."""
        scale = scale.clamp_min(_TINY).half().float()
        restored = _round_to(self._blocks, scale, self._high) * scale[..., None]
        error = ((restored - self._blocks).square() * self._importance).sum(-1)
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self.scale = torch.where(better, scale, self.scale)

    def refit(self) -> Tensor:
        """Return the least-squares scale for the codes of the best scale so far."""
        codes = _round_to(self._blocks, self.scale, self._high)
        weighted = codes * self._importance
        return (weighted * self._blocks).sum(-1) / (weighted * codes).sum(-1).clamp_min(_TINY)


def _round_to(blocks: Tensor, scale: Tensor, high: int) -> Tensor:
    return (blocks / scale[..., None]).round().clamp(-high - 1, high)


def quantize_activation(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return int8 codes (tokens, blocks, block), as float32, and scales (tokens, blocks) of ``x`` (tokens, in).

    Symmetric, scale = largest magnitude / 127 per token and block, round half to even.
    """
    tokens, columns = x.shape
    blocks = x.float().view(tokens, columns // block, block)
    largest = blocks.abs().amax(-1)
    scale = largest / INT8_MAX
    inverse = torch.where(
        largest > 0, INT8_MAX / largest, 0.0
    )  # as the kernel does it, to the last bit
    codes = (blocks * inverse[..., None]).round().clamp(-INT8_MAX, INT8_MAX)
    return codes, scale


def integer_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """Return ``x W^T + b`` in integer arithmetic: x (..., in) -> (..., out) float32.

    Within a block the dot product of int8 activation codes and integer weight codes is exact;
    the block sums are scaled and added in float32.
    """
    rows, columns = weight.codes.shape
    flat = x.reshape(-1, columns)
    codes, scale = quantize_activation(flat, weight.block)
    weight_codes = weight.codes.view(rows, columns // weight.block, weight.block).float()
    # (blocks, tokens, block) @ (blocks, block, out): exact, every partial sum is below 2^24
    dots = torch.bmm(codes.transpose(0, 1), weight_codes.permute(1, 2, 0))
    scaled = dots * scale.t()[..., None] * weight.scales.float().t()[:, None, :]
    out = scaled.sum(0)
    if bias is not None:
        out = out + bias.float()
    return out.view(*x.shape[:-1], rows)


def pack_int4(codes: Tensor) -> Tensor:
    """Pack int4 codes (out, in) two to a byte: (out, in / 2) uint8, even input channel in the low nibble.

    Codes are stored with an offset of 8 (0..15), as ``MatMulNBits`` expects.
    """
    unsigned = (codes.to(torch.int16) + 8).to(torch.uint8)
    return unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """Return the int8 codes (out, in) of `pack_int4`."""
    low, high = packed & 0x0F, packed >> 4
    pairs = torch.stack((low, high), dim=-1).view(packed.shape[0], -1)
    return pairs.to(torch.int8) - 8
