"""Does a policy draw its actions from the reference's distribution? Three distances, floor and test.

For every observation three sets of n chunks, flattened to (n, d): ``reference`` (float policy,
noises A), ``floor`` (float policy, noises B) and ``arm`` (noises B). Then, averaged over the
observations,

    ratio = distance(reference, arm) / distance(reference, floor)

where both halves share all their noise, so that the sampling error of n draws cancels: a policy
that equals the float one has the ratio 1 exactly, whatever n is. All three distances are V-statistics
(pairs of a draw with itself count), which are positive for two finite sets of the same distribution:
that value is the floor.

The p-value is a permutation test of "arm and reference draw from the same distribution at every
observation". Their noises are independent, so that under this hypothesis the 2n chunks of an
observation can be exchanged: labels are permuted within each observation, never between
observations; the statistic is the mean over observations; p = (1 + permutations with a statistic
at least as large) / (1 + permutations).

Sources: energy distance, Szekely & Rizzo (2013); MMD with a Gaussian kernel whose bandwidth is the
median distance, Gretton et al. (JMLR 2012); sliced Wasserstein, Bonneel et al. (2015).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.errors import explain

Array = NDArray[np.float64]
MIN_DRAWS = 8
DIRECTIONS = 32


class Distance(msgspec.Struct, frozen=True, kw_only=True):
    """One distance: its mean over observations, the float floor, their ratio, and the test.

    ``null_p95``: what 95 % of the permutations stay below, over their mean: how far above the floor
    an equal policy gets by chance when it draws its own noise.
    """

    value: float
    floor: float
    ratio: float
    p: float
    null_p95: float


class DistributionError(msgspec.Struct, frozen=True, kw_only=True):
    """Distances between the distributions of action chunks, normalized units."""

    energy: Distance
    mmd: Distance
    sliced_wasserstein: Distance
    observations: int
    draws: int
    permutations: int


@dataclass(frozen=True)
class _Statistic:
    """What a distance needs of one observation: ``of(labels)`` -> (k,) for labels (k, 2n) of +1/n and -1/n."""

    of: Callable[[Array], Array]


def distribution_error(
    reference: NDArray[np.floating],
    floor: NDArray[np.floating],
    arm: NDArray[np.floating],
    *,
    permutations: int = 999,
    seed: int = 0,
) -> DistributionError:
    """Compare ``arm`` with ``reference``; all three (observations, draws, ...), ``floor`` and ``arm`` on one noise.

    Raises `QuantVLAError` for fewer draws than a distribution can be told from.
    """
    sets = [x.reshape(*x.shape[:2], -1).astype(np.float64) for x in (reference, floor, arm)]
    observations, draws, dimension = sets[0].shape
    if draws < MIN_DRAWS:
        raise explain(
            "noises", f"expected at least {MIN_DRAWS} per observation", got=draws,
            remedy="ask for more with --noises (32 are usual)",
        )  # fmt: skip
    rng = np.random.default_rng(seed)
    directions = _directions(rng, dimension)
    labels = [_permuted_labels(rng, draws, permutations) for _ in range(observations)]
    identity = np.repeat([1.0 / draws, -1.0 / draws], draws)[None]
    found = {name: _Sums(permutations) for name in ("energy", "mmd", "sliced_wasserstein")}
    for index in range(observations):
        x, y, z = (s[index] for s in sets)
        pooled, pooled_floor = np.concatenate([x, z]), np.concatenate([x, y])
        for name, (ours, theirs) in _statistics(pooled, pooled_floor, directions).items():
            found[name].value += float(ours.of(identity)[0])
            found[name].floor += float(theirs.of(identity)[0])
            found[name].permuted += ours.of(labels[index])
    return DistributionError(
        energy=found["energy"].distance(observations),
        mmd=found["mmd"].distance(observations),
        sliced_wasserstein=found["sliced_wasserstein"].distance(observations),
        observations=observations,
        draws=draws,
        permutations=permutations,
    )


class _Sums:
    """Sums over the observations of one distance."""

    def __init__(self, permutations: int) -> None:
        self.value, self.floor = 0.0, 0.0
        self.permuted = np.zeros(permutations)

    def distance(self, observations: int) -> Distance:
        floor = max(self.floor, 1e-300)
        # a hair below, so that a permutation that restores the same split counts as equal
        larger = int((self.permuted >= self.value * (1 - 1e-9)).sum())
        return Distance(
            value=self.value / observations,
            floor=self.floor / observations,
            ratio=self.value / floor if self.value != self.floor else 1.0,
            p=(1 + larger) / (1 + len(self.permuted)),
            null_p95=float(np.percentile(self.permuted, 95) / max(self.permuted.mean(), 1e-300)),
        )


def _statistics(
    pooled: Array, pooled_floor: Array, directions: Array
) -> dict[str, tuple[_Statistic, _Statistic]]:
    """Return, by distance, the statistics of (reference + arm) and of (reference + floor)."""
    ours, theirs = _pairwise(pooled), _pairwise(pooled_floor)
    # of the pooled set, which permutations leave as it is; the floor is measured with the same one
    bandwidth = max(float(np.median(ours[np.triu_indices(len(ours), 1)])), 1e-12)
    return {
        "energy": (_quadratic(-ours), _quadratic(-theirs)),
        "mmd": (_quadratic(_gaussian(ours, bandwidth)), _quadratic(_gaussian(theirs, bandwidth))),
        "sliced_wasserstein": (
            _sliced_wasserstein(pooled, directions),
            _sliced_wasserstein(pooled_floor, directions),
        ),
    }


def _quadratic(matrix: Array) -> _Statistic:
    """Return ``a^T M a``: energy distance for M = -distances, squared MMD for M = kernel."""
    return _Statistic(lambda a: np.maximum(np.einsum("ki,ki->k", a @ matrix, a), 0.0))


def _sliced_wasserstein(points: Array, directions: Array) -> _Statistic:
    """Return the mean over directions of the 1-Wasserstein distance of the projections.

    In one dimension it is the area between the distribution functions, so that sorting the pooled
    projections once serves every permutation.
    """
    projected = points @ directions  # (2n, directions)
    order = np.argsort(projected, axis=0)
    gaps = np.diff(np.take_along_axis(projected, order, axis=0), axis=0)

    def of(labels: Array) -> Array:
        total = np.zeros(len(labels))
        for column in range(directions.shape[1]):
            below = np.cumsum(labels[:, order[:-1, column]], axis=1)
            total += np.abs(below) @ gaps[:, column]
        return total / directions.shape[1]

    return _Statistic(of)


def _pairwise(points: Array) -> Array:
    squares = np.einsum("id,id->i", points, points)
    distances: Array = np.sqrt(
        np.maximum(squares[:, None] + squares[None] - 2 * points @ points.T, 0.0)
    )
    np.fill_diagonal(distances, 0.0)
    return distances


def _gaussian(distances: Array, bandwidth: float) -> Array:
    kernel: Array = np.exp(-np.square(distances) / (2 * bandwidth**2))
    return kernel


def _directions(rng: np.random.Generator, dimension: int) -> Array:
    directions: Array = rng.standard_normal((dimension, DIRECTIONS))
    directions /= np.linalg.norm(directions, axis=0)
    return directions


def _permuted_labels(rng: np.random.Generator, draws: int, permutations: int) -> Array:
    """Return random splits of 2n chunks in halves: (permutations, 2n) of +1/n and -1/n."""
    halves = np.tile(np.repeat([1.0, -1.0], draws) / draws, (permutations, 1))
    labels: Array = rng.permuted(halves, axis=1)
    return labels


def distances(error: DistributionError) -> Sequence[tuple[str, Distance]]:
    """Return the three distances with the names people know them by."""
    return (
        ("energy distance", error.energy),
        ("MMD", error.mmd),
        ("sliced Wasserstein", error.sliced_wasserstein),
    )
