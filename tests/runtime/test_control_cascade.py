"""The cascade: the cheap level's answer when it is sure, the better one's when it is not and there is time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_engine import change_manifest, observation

from quantvla.runtime.control.cascade import Cascade, Level, calibrate_threshold, spread
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.policy import Policy

ROWS = 3


def make(policy: Policy, threshold: float, **options: Any) -> Cascade:
    return Cascade(Level(policy, 2), Level(policy), threshold=threshold, rows=ROWS, **options)


def test_a_sure_cheap_level_answers_itself(policy: Policy) -> None:
    cascade = make(policy, threshold=1e9)
    chunk = cascade.predict_action_chunk(observation(), seed=4)
    assert np.array_equal(chunk, policy.predict_action_chunk(observation(), seed=4, steps=2))
    assert (cascade.counts.chunks, cascade.counts.escalated) == (1, 0)


def test_an_unsure_one_is_escalated_with_the_same_noise(policy: Policy) -> None:
    cascade = make(policy, threshold=0.0)
    chunk = cascade.predict_action_chunk(observation(), seed=4)
    assert np.array_equal(chunk, policy.predict_action_chunk(observation(), seed=4))
    assert cascade.counts.escalated == 1
    noise = policy.sample_noise(9)
    again = cascade.predict_action_chunk(observation(), noise=noise)
    assert np.array_equal(again, policy.predict_action_chunk(observation(), noise=noise))


def test_the_deadline_goes_before_the_better_answer(policy: Policy, monkeypatch: Any) -> None:
    cascade = make(policy, threshold=0.0, budget_s=0.0)
    chunk = cascade.predict_action_chunk(observation(), seed=4)
    assert np.array_equal(chunk, policy.predict_action_chunk(observation(), seed=4, steps=2))
    assert (cascade.counts.escalated, cascade.counts.no_time) == (0, 1)


def test_two_engines_are_two_levels(policy: Policy, engine: Path) -> None:
    with Policy.from_pretrained(engine, threads=1) as other:
        cascade = Cascade(Level(policy, 1), Level(other), threshold=0.0, rows=ROWS)
        chunk = cascade.predict_action_chunk(observation(), seed=1)
        assert np.array_equal(chunk, other.predict_action_chunk(observation(), seed=1))
    action = change_manifest(engine).action
    import msgspec

    change_manifest(engine, action=msgspec.structs.replace(action, execute=1))
    with (
        Policy.from_pretrained(engine, threads=1) as other,
        pytest.raises(QuantVLAError, match="cascade: the levels make different actions"),
    ):
        Cascade(Level(policy), Level(other), threshold=0.0, rows=ROWS)


def test_spread_is_that_of_the_noise_in_normalized_units(policy: Policy) -> None:
    chunk = policy.predict_action_chunk(observation(), seed=0)
    assert spread(policy, [chunk, chunk, chunk], ROWS, {}) == pytest.approx(0.0, abs=1e-6)
    apart = [chunk, chunk + np.float32([2.0, 0.1])]  # one deviation of either action
    assert spread(policy, apart, ROWS, {}) == pytest.approx(np.sqrt(0.5), rel=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_threshold_escalates_about_the_asked_share(policy: Policy, share: float) -> None:
    observations = [observation(seed) for seed in range(16)]
    threshold = calibrate_threshold(Level(policy, 2), observations, rows=ROWS, share=share)
    cascade = make(policy, threshold)
    for index, obs in enumerate(observations):
        cascade.predict_action_chunk(obs, seed=index)
    assert cascade.counts.escalated == pytest.approx(16 * share, abs=1)


def test_bad_arguments(policy: Policy) -> None:
    with pytest.raises(QuantVLAError, match="cascade samples: expected at least 2, got 1"):
        make(policy, 0.0, samples=1)
    with pytest.raises(QuantVLAError, match="cascade share: expected 0 to 1, got 2"):
        calibrate_threshold(Level(policy), [observation()], rows=ROWS, share=2)
    with pytest.raises(QuantVLAError, match="no observation to calibrate on"):
        calibrate_threshold(Level(policy), [], rows=ROWS, share=0.5)
    with pytest.raises(
        QuantVLAError, match="denoise steps: expected 1 to 10, which the policy was made for, got 0"
    ):
        policy.predict_action_chunk(observation(), seed=0, steps=0)


def test_steps_are_how_often_the_stage_runs(policy: Policy) -> None:
    with policy.timing() as durations:
        policy.predict_action_chunk(observation(), seed=0, steps=3)
    assert len(durations["denoise"]) == 3
