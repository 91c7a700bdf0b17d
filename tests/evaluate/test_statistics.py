"""Statistics against published worked examples and scipy."""

from __future__ import annotations

import pytest
from scipy.stats import binomtest

from quantvla.evaluate.statistics import (
    PairCounts,
    mcnemar_p,
    paired_difference,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_published(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_symmetric_and_stays_inside() -> None:
    for trials in (1, 7, 200):
        for successes in range(trials + 1):
            low, high = wilson_interval(successes, trials)
            assert 0 <= low <= successes / trials <= high <= 1
            mirrored = wilson_interval(trials - successes, trials)
            assert (1 - high, 1 - low) == pytest.approx(mirrored)


def test_wilson_without_trials_says_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("only_a", "only_b"), [(3, 12), (0, 1), (0, 9), (5, 5), (40, 22)])
def test_mcnemar_is_the_binomial_test(only_a: int, only_b: int) -> None:
    expected = binomtest(only_a, only_a + only_b).pvalue
    assert mcnemar_p(only_a, only_b) == pytest.approx(expected)
    assert mcnemar_p(only_b, only_a) == pytest.approx(expected)


def test_mcnemar_without_discordant_pairs() -> None:
    assert mcnemar_p(0, 0) == 1.0


def test_paired_difference_published() -> None:
    """Newcombe 1998 (17:2635): 36, 12, 2, 0 gives 0.2 with 0.0569 to 0.3404 by method 10."""
    found = paired_difference(PairCounts(both=36, only_a=2, only_b=12, neither=0))
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.0569, 0.3404), abs=5e-5)


def test_paired_difference_mirrors_when_arms_are_swapped() -> None:
    one = paired_difference(PairCounts(both=150, only_a=11, only_b=4, neither=35))
    other = paired_difference(PairCounts(both=150, only_a=4, only_b=11, neither=35))
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))
    assert one.low < one.value < one.high


def test_paired_difference_without_pairs_says_nothing() -> None:
    found = paired_difference(PairCounts(0, 0, 0, 0))
    assert (found.value, found.low, found.high) == (0.0, -1.0, 1.0)
