"""Normalization of states and actions, as lerobot's normalizer steps compute it (float32)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.errors import explain
from quantvla.runtime.processing_steps import FeatureStatistics, Normalization

FloatArray = NDArray[np.float32]

_STATISTICS: dict[Normalization, tuple[str, str]] = {
    "mean_std": ("mean", "std"),
    "min_max": ("min", "max"),
    "quantiles": ("q01", "q99"),
    "quantile10": ("q10", "q90"),
}


@dataclass(frozen=True)
class Normalizer:
    """Maps a feature between physical and normalized units.

    ``low`` and ``high`` are the two statistics of the mode (mean and standard deviation, or the
    two ends of the range), (dim,) float32; both None for the identity. With
    ``flat_to_zero`` an entry whose range is empty is 0 when normalized.
    """

    mode: Normalization
    eps: float
    low: FloatArray | None
    high: FloatArray | None
    flat_to_zero: bool = False

    @property
    def dim(self) -> int | None:
        """Length of the feature, None when nothing says it."""
        return None if self.low is None else int(self.low.shape[0])

    def normalize(self, x: FloatArray) -> FloatArray:
        """x: (..., dim) physical -> (..., dim) normalized."""
        if self.low is None or self.high is None:
            return x
        if self.mode == "mean_std":
            return (x - self.low) / (self.high + np.float32(self.eps))
        mapped = np.float32(2) * (x - self.low) / self._range() - np.float32(1)
        return (
            np.where(self.high == self.low, np.float32(0), mapped) if self.flat_to_zero else mapped
        )

    def unnormalize(self, x: FloatArray) -> FloatArray:
        """x: (..., dim) normalized -> (..., dim) physical."""
        if self.low is None or self.high is None:
            return x
        if self.mode == "mean_std":
            return x * self.high + self.low
        return (x + np.float32(1)) * self._range() / np.float32(2) + self.low

    def _range(self) -> FloatArray:
        assert self.low is not None and self.high is not None
        width = self.high - self.low
        return np.where(width == 0, np.float32(self.eps), width)


def make_normalizer(
    key: str,
    mode: Normalization,
    eps: float,
    statistics: FeatureStatistics | None,
    *,
    flat_to_zero: bool = False,
) -> Normalizer:
    """Return the normalizer of feature ``key``.

    Raises `QuantVLAError` when the mode needs statistics that are missing, not finite or of
    different lengths. (lerobot would pass the feature through unchanged.)
    """
    if mode == "identity":
        return Normalizer(mode, eps, None, None)
    low, high = (_statistic(key, mode, name, statistics) for name in _STATISTICS[mode])
    if low.shape != high.shape:
        raise explain(
            f"statistics of {key!r}",
            f"{' and '.join(_STATISTICS[mode])} have different lengths",
            got=f"{low.size} and {high.size}",
            remedy="export the engine again",
        )
    return Normalizer(mode, eps, low, high, flat_to_zero)


def _statistic(
    key: str, mode: Normalization, name: str, statistics: FeatureStatistics | None
) -> FloatArray:
    values: tuple[float, ...] | None = getattr(statistics, name, None)
    if values is None:
        raise explain(
            f"statistics of {key!r}",
            f"{name!r} is missing and normalization {mode!r} needs it",
            remedy="export from a checkpoint that was saved with its dataset statistics",
        )
    array = np.asarray(values, dtype=np.float32)
    if not np.isfinite(array).all():
        raise explain(
            f"statistics of {key!r}",
            f"{name!r} must be finite",
            got=f"{values}",
            remedy="recompute the dataset statistics",
        )
    return array
