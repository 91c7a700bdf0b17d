"""The reference integer arithmetic: every quantizer, packer and kernel is checked against this file.

Weights are symmetric, block-wise along the input dimension. Activations are symmetric int8 per
token and block, which is what ONNX Runtime's ``MatMulNBits`` computes with ``accuracy_level=4``, or
uint8 with one zero point and scale for all tokens, which is its ``DynamicQuantizeMatMul``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantvla.schemes import Inputs

INT8_MAX = 127
UINT8_MAX = 255
_SCALE_CANDIDATES = 48
_SMALLEST_RATIO = 0.5
_REFITS = 2
_SEARCHED_AT_A_TIME = 1 << 20  # weights, so that what a candidate needs stays in the cache
_TINY = 2.0**-24  # the smallest positive half-precision number


@dataclass(frozen=True)
class StaticInput:
    """What a simulated linear does to its input before it multiplies.

    x (tokens, in) times ``transform`` (in, in), rounded to int8 with ``scales`` (in,), both float32.
    """

    transform: Tensor
    scales: Tensor

    def represented(self, x: Tensor) -> Tensor:
        """Return the transformed input as its codes represent it: (tokens, in) -> (tokens, in) float32."""
        codes = (x.float() @ self.transform / self.scales).round().clamp(-INT8_MAX, INT8_MAX)
        return codes * self.scales


@dataclass(frozen=True)
class QuantizedWeight:
    """Integer weight of one linear.

    ``codes``: (out, in) int8 in [-2^(bits-1), 2^(bits-1) - 1]; ``scales``: (out, in / block)
    float16. The weight they stand for is ``codes * scales`` with each scale spread over its block.
    ``inputs`` is what a kernel multiplies them with (see `Scheme`), ``static`` what ``int8_static``
    ones need besides.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    block: int
    inputs: Inputs = "int8_block"
    static: StaticInput | None = None

    def dequantize(self) -> Tensor:
        """Return the represented weight: (out, in) float32."""
        rows, columns = self.codes.shape
        blocks = self.codes.view(rows, columns // self.block, self.block).float()
        return (blocks * self.scales.float()[..., None]).view(rows, columns)


def quantize_weight(
    weight: Tensor,
    bits: int,
    block: int,
    importance: Tensor | None = None,
    inputs: Inputs = "int8_block",
    *,
    search: bool = True,
) -> QuantizedWeight:
    """Round ``weight`` (out, in) to integers with the block scales of least weighted error (`block_scales`).

    Scales are rounded to half precision before the codes are computed, so the stored pair is exact.
    """
    rows, columns = weight.shape
    scales = block_scales(weight, bits, block, importance, search=search)
    blocks = weight.detach().float().view(rows, columns // block, block)
    codes = round_codes(blocks, scales[..., None], bits).to(torch.int8).view(rows, columns)
    return QuantizedWeight(codes, scales.half(), bits, block, inputs)


def block_scales(
    weight: Tensor, bits: int, block: int, importance: Tensor | None = None, *, search: bool = True
) -> Tensor:
    """Return block scales of ``weight`` (out, in): (out, in / block) float32, half-precision numbers.

    For each block the scale is searched among fractions of the one that just covers the largest
    magnitude, then refitted to the codes by least squares; the error of a candidate is
    ``sum_k importance_k (w_k - s q_k)^2`` with ``importance``: (in,) the second moment E[x_k^2] of
    the input channel (all ones when absent). Without ``search`` it is the covering scale itself.
    """
    columns = weight.shape[1]
    importance = torch.ones(columns) if importance is None else importance.float()
    rows = max(1, _SEARCHED_AT_A_TIME // columns)  # each row is searched by itself
    parts = torch.split(weight.detach(), rows)
    return torch.cat([_block_scales(part, bits, block, importance, search) for part in parts])


def _block_scales(
    weight: Tensor, bits: int, block: int, importance: Tensor, search: bool
) -> Tensor:
    rows, columns = weight.shape
    blocks = weight.float().view(rows, columns // block, block)
    largest = blocks.abs().amax(-1) / (2 ** (bits - 1) - 1)
    candidates = _ScaleSearch(blocks, importance.view(1, columns // block, block), bits)
    smallest, count = (_SMALLEST_RATIO, _SCALE_CANDIDATES) if search else (1.0, 1)
    for ratio in torch.linspace(1.0, smallest, count).tolist():
        candidates.consider(largest * ratio)
    for _ in range(_REFITS if search else 0):
        candidates.consider(candidates.refit())
    return candidates.scale


class _ScaleSearch:
    """The best scale of each block among those considered."""

    def __init__(self, blocks: Tensor, importance: Tensor, bits: int) -> None:
        self._blocks, self._importance, self._bits = blocks, importance, bits
        self.scale = torch.ones(blocks.shape[:-1])
        self._error = torch.full(blocks.shape[:-1], torch.inf)

    def consider(self, scale: Tensor) -> None:
        """Keep ``scale`` (out, blocks) where its error is smaller."""
        scale = scale.clamp_min(_TINY).half().float()
        restored = round_codes(self._blocks, scale[..., None], self._bits) * scale[..., None]
        error = ((restored - self._blocks).square() * self._importance).sum(-1)
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self.scale = torch.where(better, scale, self.scale)

    def refit(self) -> Tensor:
        """Return the least-squares scale for the codes of the best scale so far."""
        codes = round_codes(self._blocks, self.scale[..., None], self._bits)
        weighted = codes * self._importance
        return (weighted * self._blocks).sum(-1) / (weighted * codes).sum(-1).clamp_min(_TINY)


def round_codes(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the codes nearest to ``values / scale``, as floats: round half to even, saturated."""
    high = 2 ** (bits - 1) - 1
    return (values / scale).round().clamp(-high - 1, high)


def quantize_activation(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return int8 codes (tokens, blocks, block), as float32, and scales (tokens, blocks) of ``x`` (tokens, in).

    Symmetric, scale = largest magnitude / 127 per token and block, round half to even.
    """
    tokens, columns = x.shape
    blocks = x.float().view(tokens, columns // block, block)
    largest = blocks.abs().amax(-1)
    scale = largest / INT8_MAX
    # One division, as kernels do it: torch makes ``127 / x`` of a reciprocal and a product, and the last
    # bit of the difference moves an activation near a rounding boundary to the other code.
    inverse = torch.where(largest > 0, torch.full_like(largest, INT8_MAX) / largest, 0.0)
    codes = (blocks * inverse[..., None]).round().clamp(-INT8_MAX, INT8_MAX)
    return codes, scale


def quantize_tensor(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes with the zero point taken off, like ``x``, as float32, and the scale (a scalar).

    uint8 over the range of the whole tensor, extended to contain 0 (ONNX ``DynamicQuantizeLinear``).
    """
    low, high = x.float().min().clamp_max(0), x.float().max().clamp_min(0)
    scale = (high - low) / UINT8_MAX
    if scale == 0:
        return torch.zeros_like(x, dtype=torch.float32), torch.ones(())
    zero = (-low / scale).round().clamp(0, UINT8_MAX)
    return ((x.float() / scale).round() + zero).clamp(0, UINT8_MAX) - zero, scale


def represented_input(x: Tensor, block: int, inputs: Inputs) -> Tensor:
    """Return what a kernel makes of ``x`` (tokens, in): the numbers its input codes stand for, float32."""
    if inputs == "float":
        return x.float()
    if inputs == "uint8_tensor":
        codes, scale = quantize_tensor(x)
        return codes * scale
    codes, scale = quantize_activation(x, block)
    return (codes * scale[..., None]).view_as(x)


def integer_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """Return ``x W^T + b`` in the arithmetic of ``weight``: x (..., in) -> (..., out) float32.

    Dot products of integer codes are exact; they are scaled and added in float32.
    """
    flat = x.reshape(-1, x.shape[-1])
    if weight.static is not None:
        out = weight.static.represented(flat) @ weight.dequantize().t()
    elif weight.inputs == "float":
        out = flat.float() @ weight.dequantize().t()
    elif weight.inputs == "uint8_tensor":
        codes, scale = quantize_tensor(flat)
        dots = (codes.double() @ weight.codes.double().t()).float()
        out = dots * (scale * weight.scales.float().view(1, -1))
    else:
        out = _blockwise(flat, weight)
    if bias is not None:
        out = out + bias.float()
    return out.view(*x.shape[:-1], weight.codes.shape[0])


def _blockwise(x: Tensor, weight: QuantizedWeight) -> Tensor:
    rows, columns = weight.codes.shape
    codes, scale = quantize_activation(x, weight.block)
    weight_codes = weight.codes.view(rows, columns // weight.block, weight.block).float()
    # (blocks, tokens, block) @ (blocks, block, out): exact, every partial sum is below 2^24
    dots = torch.bmm(codes.transpose(0, 1), weight_codes.permute(1, 2, 0))
    return (dots * scale.t()[..., None] * weight.scales.float().t()[:, None, :]).sum(0)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Return codes (out, in) as they are stored, with an offset of 2^(bits-1): uint8, two to a byte if 4-bit."""
    return pack_int4(codes) if bits == 4 else (codes.to(torch.int16) + 128).to(torch.uint8)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Return the int8 codes (out, in) of `pack_codes`."""
    return unpack_int4(packed) if bits == 4 else (packed.to(torch.int16) - 128).to(torch.int8)


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
