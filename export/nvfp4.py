"""NVFP4 numbers: E2M1 codes in blocks of 16, an E4M3 scale a block, a float32 scale a tensor.

A value is code * block scale * tensor scale. Inputs get their block scales at run time
(TensorRT's dynamic quantization with a double scale, operator ``TRT_FP4DynamicQuantize``); weights get
theirs here, each block the better of two: its largest magnitude at 6, the largest code, or at 4, which
leaves smaller steps below it (arXiv 2512.02010).
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

BLOCK = 16
DYNAMIC_QUANTIZE = "TRT_FP4DynamicQuantize"
E2M1_MAX, E4M3_MAX = 6.0, 448.0
_FULL = (6.0, 4.0)
Array = NDArray[np.float32]
Codes = NDArray[np.generic]


def quantize_blocks(x: Array, tensor_scale: float, full: float = E2M1_MAX) -> tuple[Codes, Codes]:
    """Return codes (..., in) and scales (..., in / 16) that put every block's largest magnitude at ``full``.

    With ``full`` 6 this is the definition of TensorRT's dynamic quantization.
    """
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    largest = np.abs(blocks).max(-1)
    wanted = np.minimum(largest / np.float32(full * tensor_scale), np.float32(E4M3_MAX))
    scales = wanted.astype(ml_dtypes.float8_e4m3fn)
    steps = scales.astype(np.float32)[..., None] * np.float32(tensor_scale)
    ratio = np.divide(blocks, steps, out=np.zeros_like(blocks), where=steps > 0)
    codes = np.clip(ratio, -E2M1_MAX, E2M1_MAX).astype(ml_dtypes.float4_e2m1fn)
    return codes.reshape(x.shape), scales


def dequantize_blocks(codes: Codes, scales: Codes, tensor_scale: float) -> Array:
    """Return the values (..., in) of codes (..., in) and block scales (..., in / 16)."""
    steps = scales.astype(np.float32) * np.float32(tensor_scale)
    return codes.astype(np.float32) * np.repeat(steps, BLOCK, axis=-1)


def weight_blocks(weight: Array) -> tuple[Codes, Codes, np.float32]:
    """Return codes (out, in), block scales (out, in / 16) and the tensor scale of a weight (out, in)."""
    tensor_scale = np.float32(max(float(np.abs(weight).max()), 2.0**-24) / (min(_FULL) * E4M3_MAX))
    found = [quantize_blocks(weight, float(tensor_scale), full) for full in _FULL]
    errors = [
        np.square(dequantize_blocks(*pair, float(tensor_scale)) - weight)
        .reshape(*weight.shape[:-1], -1, BLOCK)
        .sum(-1)
        for pair in found
    ]
    first = errors[0] <= errors[1]
    codes = np.where(np.repeat(first, BLOCK, axis=-1), found[0][0], found[1][0])
    return codes, np.where(first, found[0][1], found[1][1]), tensor_scale
