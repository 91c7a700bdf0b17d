"""Normalization equals lerobot's steps in every mode, both ways."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.processor import NormalizerProcessorStep, TransitionKey, UnnormalizerProcessorStep

from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.normalize import make_normalizer
from quantvla.runtime.processing_steps import FeatureStatistics, Normalization

EPS = 1e-8
KEY = "observation.state"
STATISTICS = {
    "mean": [0.25, -3.0, 100.0, 0.0],
    "std": [0.5, 2.0, 30.0, 0.0],
    "min": [-1.0, -9.0, 0.0, 4.0],
    "max": [1.0, 9.0, 200.0, 4.0],
    "q01": [-0.9, -8.0, 3.0, 1.0],
    "q99": [0.9, 8.5, 180.0, 1.0],
    "q10": [-0.5, -4.0, 20.0, 2.0],
    "q90": [0.6, 4.5, 150.0, 2.5],
}
MODES: list[Normalization] = ["identity", "mean_std", "min_max", "quantiles", "quantile10"]


def _statistics() -> FeatureStatistics:
    return FeatureStatistics(**{name: tuple(values) for name, values in STATISTICS.items()})


@pytest.mark.parametrize("mode", MODES)
def test_normalize_equals_lerobot(mode: Normalization) -> None:
    step = NormalizerProcessorStep(
        features={KEY: PolicyFeature(type=FeatureType.STATE, shape=(4,))},
        norm_map={FeatureType.STATE: NormalizationMode(mode.upper())},
        stats={KEY: STATISTICS},
        eps=EPS,
    )
    x = np.array([0.7, 4.0, 120.0, 0.0], np.float32)
    x[3] = {"min_max": 4.0, "quantiles": 1.0}.get(mode, 0.0)  # zero range: only its value is finite
    expected = step({TransitionKey.OBSERVATION: {KEY: torch.from_numpy(x)[None]}})
    found = make_normalizer(KEY, mode, EPS, _statistics()).normalize(x)
    assert found.dtype == np.float32
    np.testing.assert_allclose(
        found, expected[TransitionKey.OBSERVATION][KEY][0].numpy(), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("mode", MODES)
def test_unnormalize_equals_lerobot(mode: Normalization) -> None:
    step = UnnormalizerProcessorStep(
        features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(4,))},
        norm_map={FeatureType.ACTION: NormalizationMode(mode.upper())},
        stats={"action": STATISTICS},
        eps=EPS,
    )
    x = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    expected = step({TransitionKey.ACTION: torch.from_numpy(x)})[TransitionKey.ACTION]
    found = make_normalizer("action", mode, EPS, _statistics()).unnormalize(x)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_round_trip(mode: Normalization) -> None:
    statistics = FeatureStatistics(
        **{name: tuple(values[:3]) for name, values in STATISTICS.items()}
    )
    normalizer = make_normalizer(KEY, mode, EPS, statistics)
    x = np.array([0.7, 4.0, 120.0], np.float32)
    np.testing.assert_allclose(normalizer.unnormalize(normalizer.normalize(x)), x, rtol=1e-5)


@pytest.mark.parametrize("statistics", [None, FeatureStatistics(mean=(0.0,))])
def test_missing_statistics(statistics: FeatureStatistics | None) -> None:
    with pytest.raises(QuantVLAError, match=r"statistics of 'observation.state': '(mean|std)' is"):
        make_normalizer(KEY, "mean_std", EPS, statistics)


def test_not_finite_statistics() -> None:
    with pytest.raises(QuantVLAError, match="'min' must be finite"):
        make_normalizer(KEY, "min_max", EPS, FeatureStatistics(min=(float("nan"),), max=(1.0,)))


def test_statistics_of_different_lengths() -> None:
    with pytest.raises(QuantVLAError, match="mean and std have different lengths, got 1 and 2"):
        make_normalizer(KEY, "mean_std", EPS, FeatureStatistics(mean=(0.0,), std=(1.0, 1.0)))
