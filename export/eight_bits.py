"""Weights in eight bits: int8 with a scale per output, E4M3 with one scale."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quantvla.activation_scales import FP8_MAX, INT8_MAX


def integer_columns(
    weight: NDArray[np.float32], scale_type: np.dtype[np.generic]
) -> tuple[NDArray[np.int8], NDArray[np.generic]]:
    """Return int8 codes (out, in) and one scale per output (out,), codes of the scales as stored."""
    scales = np.maximum(np.abs(weight).max(1) / INT8_MAX, 2.0**-24).astype(scale_type)
    codes = np.rint(weight / scales.astype(np.float32)[:, None])
    return np.clip(codes, -INT8_MAX, INT8_MAX).astype(np.int8), scales


def fp8_tensor(
    weight: NDArray[np.float32], scale_type: np.dtype[np.generic]
) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """Return E4M3 codes (out, in) and one scale () for the whole weight."""
    scale = np.array(max(float(np.abs(weight).max()) / FP8_MAX, 2.0**-24), scale_type)
    scaled = np.clip(weight / scale.astype(np.float32), -FP8_MAX, FP8_MAX)
    return scaled.astype(ml_dtypes.float8_e4m3fn), scale
