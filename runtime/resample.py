"""Bicubic resize of 8-bit images with antialiasing, bit for bit as torch computes it on a CPU.

torch (``interpolate(mode="bicubic", antialias=True)`` on uint8) rounds the weights of every output
pixel to 16-bit integers, sums in 32 bits and rounds to 8 bits after each axis, columns first.
Integers have one result, so these arrays are equal, not close.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
_A = -0.5  # of the cubic kernel, for antialiasing
_REACH = 2.0  # of the kernel, in pixels
_WEIGHT_BITS = 15
_MOST_BITS = 22


def resample(image: Bytes, size: tuple[int, int]) -> Bytes:
    """Return ``image`` (height, width, channels) at ``size`` (height, width); sides that fit stay as they are."""
    height, width = size
    if image.shape[1] != width:
        image = _resample_columns(image, width)
    if image.shape[0] != height:
        image = _resample_columns(image.transpose(1, 0, 2), height).transpose(1, 0, 2)
    return image


def centre_crop(image: Bytes, size: tuple[int, int]) -> Bytes:
    """Return the middle of ``image`` (height, width, channels); the odd pixel is left over on the right and below."""
    top, left = ((have - want) // 2 for have, want in zip(image.shape, size, strict=False))
    return image[top : top + size[0], left : left + size[1]]


def pad_to_square(image: Bytes) -> Bytes:
    """Return ``image`` (height, width, channels) in the middle of a black square."""
    height, width = image.shape[:2]
    edge = max(height, width)
    square = np.zeros((edge, edge, image.shape[2]), np.uint8)
    top, left = (edge - height) // 2, (edge - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def _resample_columns(image: Bytes, width: int) -> Bytes:
    columns, weights, bits = _kernel(image.shape[1], width)
    total = np.full((image.shape[0], width, image.shape[2]), 1 << (bits - 1), np.int32)
    for column, weight in zip(columns.T, weights.T, strict=True):
        total += image.take(column, axis=1) * weight[:, None]
    return np.clip(total >> bits, 0, 255).astype(np.uint8)


@lru_cache(maxsize=64)
def _kernel(length: int, resized: int) -> tuple[NDArray[np.intp], NDArray[np.int32], int]:
    """Return for each output pixel along one axis its source pixels, their weights, and the bits of a weight of one."""
    scale = length / resized
    stretch = max(scale, 1.0)
    centre = scale * (np.arange(resized) + 0.5)
    first = np.maximum((centre - _REACH * stretch + 0.5).astype(np.intp), 0)
    last = np.minimum((centre + _REACH * stretch + 0.5).astype(np.intp), length)
    tap = np.arange((last - first).max())
    weights = _cubic(np.abs((first[:, None] + tap - centre[:, None] + 0.5) / stretch))
    weights[tap >= (last - first)[:, None]] = 0.0
    weights /= weights.sum(axis=1, keepdims=True)
    bits = 0
    while bits < _MOST_BITS and int(0.5 + weights.max() * (1 << (bits + 1))) < 1 << _WEIGHT_BITS:
        bits += 1
    integers = np.trunc(weights * (1 << bits) + np.copysign(0.5, weights)).astype(np.int32)
    return np.minimum(first[:, None] + tap, length - 1), integers, bits


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the cubic convolution kernel at distances ``x``."""
    near = ((_A + 2) * x - (_A + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * _A
    return np.where(x < 1, near, np.where(x < _REACH, far, 0.0))
