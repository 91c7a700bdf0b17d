"""What success counts say: interval of a rate, difference of paired rates and its interval, exact test.

Sources: Wilson (JASA 1927) for one rate; Newcombe, "Improved confidence intervals for the
difference between binomial proportions based on paired data" (Statistics in Medicine 17:2635,
1998), method 10, for a paired difference; McNemar (Psychometrika 1947), exact binomial form.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import msgspec


class Difference(msgspec.Struct, frozen=True):
    """Difference of two paired rates, b minus a, with its confidence interval, all in [-1, 1]."""

    value: float
    low: float
    high: float


class PairCounts(msgspec.Struct, frozen=True):
    """Paired outcomes of arms a and b: how many episodes both, only one, or neither solved."""

    both: int
    only_a: int
    only_b: int
    neither: int

    @property
    def episodes(self) -> int:
        """How many pairs were counted."""
        return self.both + self.only_a + self.only_b + self.neither


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a success rate; (0, 1) when nothing was tried."""
    if trials == 0:
        return 0.0, 1.0
    z2 = _quantile(confidence) ** 2
    rate = successes / trials
    centre = rate + z2 / (2 * trials)
    spread = math.sqrt(z2 * (rate * (1 - rate) / trials + z2 / (4 * trials**2)))
    scale = 1 + z2 / trials
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == trials else (centre + spread) / scale
    return low, high


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Return McNemar's exact two-sided p-value: are the discordant pairs split evenly?"""
    discordant = only_a + only_b
    if discordant == 0:
        return 1.0
    tail = sum(math.comb(discordant, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, float(2 * tail / 2**discordant))


def paired_difference(counts: PairCounts, confidence: float = 0.95) -> Difference:
    """Return rate(b) - rate(a) with Newcombe's method 10 interval; (-1, 1) when nothing was tried."""
    n = counts.episodes
    if n == 0:
        return Difference(0.0, -1.0, 1.0)
    solved_a, solved_b = counts.both + counts.only_a, counts.both + counts.only_b
    rate_a, rate_b = solved_a / n, solved_b / n
    low_a, high_a = wilson_interval(solved_a, n, confidence)
    low_b, high_b = wilson_interval(solved_b, n, confidence)
    phi = _phi(counts)
    below = _combine(rate_b - low_b, high_a - rate_a, phi)
    above = _combine(high_b - rate_b, rate_a - low_a, phi)
    value = (counts.only_b - counts.only_a) / n
    return Difference(value, max(-1.0, value - below), min(1.0, value + above))


def _quantile(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _combine(x: float, y: float, phi: float) -> float:
    return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))


def _phi(counts: PairCounts) -> float:
    """Return the continuity-corrected correlation of the paired outcomes (method 10)."""
    solved_a, solved_b = counts.both + counts.only_a, counts.both + counts.only_b
    n = counts.episodes
    product = solved_a * (n - solved_a) * solved_b * (n - solved_b)
    if product == 0:
        return 0.0
    cross = counts.both * counts.neither - counts.only_a * counts.only_b
    corrected = max(cross - n / 2, 0.0) if cross > 0 else float(cross)
    return corrected / math.sqrt(product)
