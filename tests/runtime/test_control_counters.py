"""Measurements of a run that never ends, in constant memory."""

from __future__ import annotations

import numpy as np
import pytest

from quantvla.runtime.control import counters
from quantvla.runtime.control.counters import Samples, Spread


def test_the_spread_is_numpys() -> None:
    samples, values = Samples(), np.random.default_rng(0).random(999)
    for value in values:
        samples.add(float(value))
    p50, p99 = np.percentile(values, (50, 99))
    assert samples.spread(1e3) == Spread(*(round(1e3 * v, 4) for v in (p50, p99, values.max())))


def test_nothing_measured_is_zero() -> None:
    assert Samples().spread() == Spread(0.0, 0.0, 0.0) == Samples().spread(last=3)


def test_percentiles_forget_what_is_long_past_and_the_largest_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(counters, "WINDOW", 10)
    samples = Samples()
    for value in [100.0] + [1.0] * 10 + [2.0] * 5:
        samples.add(value)
    assert samples.spread() == Spread(1.5, 2.0, 100.0)
    assert samples.spread(last=3) == Spread(2.0, 2.0, 2.0)
    assert samples.count == 16
