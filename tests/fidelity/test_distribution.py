"""Distances between action distributions on data with known answers."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from quantvla.fidelity.distribution import DistributionError, distances, distribution_error
from quantvla.runtime.errors import QuantVLAError

OBSERVATIONS, DRAWS, SHAPE = 12, 24, (4, 3)


def draws(seed: int, shift: float = 0.0, scale: float = 1.0) -> NDArray[np.float32]:
    """Draws whose mean differs from one observation to the next, as those of a policy do."""
    rng = np.random.default_rng(seed)
    means = np.random.default_rng(99).standard_normal((OBSERVATIONS, 1, *SHAPE)) * 3
    spread = scale * rng.standard_normal((OBSERVATIONS, DRAWS, *SHAPE))
    return (means + spread + shift).astype(np.float32)


def compare(arm: NDArray[np.float32]) -> DistributionError:
    return distribution_error(draws(1), draws(2), arm, permutations=199)


def test_an_equal_policy_has_ratio_one() -> None:
    for name, distance in distances(compare(draws(2))):
        assert distance.ratio == 1.0, name
        assert distance.p > 0.02, name


def test_another_draw_of_the_same_distribution_is_within_the_null() -> None:
    for name, distance in distances(compare(draws(3))):
        assert distance.ratio == pytest.approx(1, abs=0.25), name
        assert distance.p > 0.02, name
        assert 1 < distance.null_p95 < 1.5, name


@pytest.mark.parametrize("arm", [draws(2, shift=0.5), draws(2, scale=1.6), draws(2, scale=0.5)])
def test_a_shift_or_a_spread_is_noticed(arm: NDArray[np.float32]) -> None:
    for name, distance in distances(compare(arm)):
        assert distance.ratio > 1.2, name
        assert distance.p == pytest.approx(1 / 200), name


def test_the_ratio_grows_with_the_shift() -> None:
    ratios = [
        [distance.ratio for _, distance in distances(compare(draws(2, shift=shift)))]
        for shift in (0.0, 0.3, 0.6, 1.2)
    ]
    assert np.all(np.diff(np.array(ratios), axis=0) > 0)


def test_p_values_are_uniform_when_nothing_differs() -> None:
    """The test is exact: about one in ten p-values of equal policies is below a tenth."""
    found = [
        distribution_error(
            rng.standard_normal((3, 8, 2)), rng.standard_normal((3, 8, 2)),
            rng.standard_normal((3, 8, 2)), permutations=99, seed=seed,
        ).energy.p
        for seed in range(200)
        for rng in [np.random.default_rng(1000 + seed)]
    ]  # fmt: skip
    assert 0.04 < np.mean(np.array(found) <= 0.1) < 0.17
    assert 0.4 < np.mean(found) < 0.6


def test_labels_are_permuted_within_an_observation() -> None:
    """Observations far apart and equal policies: mixing observations would make the statistic huge."""
    far = np.arange(OBSERVATIONS)[:, None, None, None] * 100.0
    result = distribution_error(draws(1) + far, draws(2) + far, draws(3) + far, permutations=99)
    assert result.energy.null_p95 < 1.5


def test_known_energy_distance_and_wasserstein() -> None:
    """Two point masses a distance 3 apart: energy distance 2 * 3, all projections shrink alike."""
    zeros, threes = np.zeros((1, 10, 1)), np.full((1, 10, 1), 3.0)
    result = distribution_error(zeros, zeros, threes, permutations=9)
    assert result.energy.value == pytest.approx(6)
    assert result.sliced_wasserstein.value == pytest.approx(3)


def test_same_input_same_result() -> None:
    assert compare(draws(3)) == compare(draws(3))


def test_too_few_draws_are_refused() -> None:
    few = draws(1)[:, :4]
    with pytest.raises(QuantVLAError, match=r"noises: expected at least 8 per .*, got 4; ask for"):
        distribution_error(few, few, few)
