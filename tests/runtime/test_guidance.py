"""Real-time chunking in the sampler: weights, and what the three methods promise."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_engine import ACTION_DIM, HORIZON, RATE, STEPS, observation

from quantvla.runtime.control.realtime_chunking import RealTimeChunking
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.guidance import (
    METHODS,
    ActionPrefix,
    guidance_weight,
    make_guidance,
    prefix_weights,
)
from quantvla.runtime.policy import Policy


def test_weights_bind_the_frozen_rows_and_fade_to_the_overlap() -> None:
    for schedule in ("linear", "exponential", "ones", "zeros"):
        weights = prefix_weights(2, 6, 8, schedule)
        assert weights[:2].tolist() == [1, 1] and weights[6:].tolist() == [0, 0]
        assert (np.diff(weights) <= 0).all() and weights.dtype == np.float32
    assert prefix_weights(2, 6, 8, "linear")[2:6] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert prefix_weights(9, 4, 8, "ones").sum() == 4 and prefix_weights(0, 0, 8, "ones").sum() == 0


def test_guidance_weight_is_bounded_and_follows_the_paper() -> None:
    assert guidance_weight(1.0, 10.0) == 10.0
    assert guidance_weight(0.5, 10.0) == pytest.approx(2.0)
    assert guidance_weight(0.01, 5.0) == 5.0


def test_a_prefix_that_binds_nothing_changes_no_bit(policy: Policy) -> None:
    plain = policy.predict_action_chunk(observation(), seed=1)
    for method in ("prefix", "forward"):
        free = ActionPrefix(plain + 1, frozen=0, overlap=0, method=method)
        assert np.array_equal(
            policy.predict_action_chunk(observation(), seed=1, prefix=free), plain
        )


def test_frozen_rows_of_the_prefix_method_come_out_as_they_were_planned(policy: Policy) -> None:
    plain = policy.predict_action_chunk(observation(), seed=1)
    planned = plain + np.float32([5.0, 0.5])
    prefix = ActionPrefix(planned, frozen=2, overlap=3)
    chunk = policy.predict_action_chunk(observation(), seed=1, prefix=prefix)
    assert chunk[:2] == pytest.approx(planned[:2], abs=1e-4)
    assert np.array_equal(chunk[3:], plain[3:]), "rows of this engine do not see each other"
    assert np.abs(chunk[2] - plain[2]).min() > 0 and np.abs(chunk[2] - planned[2]).min() > 0


def test_the_forward_method_has_the_closed_form_of_its_recursion(policy: Policy) -> None:
    planned = np.full((HORIZON, ACTION_DIM), 10.0, np.float32)
    prefix = ActionPrefix(
        planned, frozen=HORIZON, schedule="ones", method="forward", max_weight=3.0
    )
    noise = np.ones(policy.manifest.sampler.noise_shape, np.float32)
    context = policy.prepare(observation())["context"][0]
    target = policy.postprocessor.normalize(planned)
    x = np.ones((HORIZON, ACTION_DIM))
    for k in range(STEPS):
        t = 1.0 - k / STEPS
        v = RATE * x + context + t
        x = x - (v - guidance_weight(t, 3.0) * (target - (x - t * v))) / STEPS
    chunk = policy.predict_action_chunk(observation(), noise=noise, prefix=prefix)
    assert policy.postprocessor.normalize(chunk) == pytest.approx(x, abs=1e-4)


def test_normalizing_inverts_postprocessing(policy: Policy) -> None:
    chunk = policy.predict(observation(), seed=0)
    assert policy.postprocessor.normalize(chunk.actions) == pytest.approx(
        chunk.normalized[0, :, :ACTION_DIM], abs=1e-5
    )


def test_real_time_chunking_takes_lerobots_arguments(policy: Policy) -> None:
    rtc = RealTimeChunking(policy, execute=2)
    plain = policy.predict_action_chunk(observation(), seed=1)
    assert np.array_equal(rtc.predict_action_chunk(observation(), seed=1), plain)
    left_over = plain[1:] + 1
    chunk = rtc.predict_action_chunk(
        observation(), inference_delay=2, prev_chunk_left_over=left_over, seed=1
    )
    assert chunk[:2] == pytest.approx(left_over[:2], abs=1e-4)


def test_bad_prefixes(policy: Policy) -> None:
    rows = np.zeros((HORIZON, ACTION_DIM), np.float32)
    for prefix, message in (
        (ActionPrefix(rows[:, :1], 1), r"actions: expected rows of 2 numbers, got shape \(4, 1\)"),
        (ActionPrefix(rows, 1, method="vj"), f"guidance method: unknown, got 'vj'; known: {METHODS[0]}"),  # type: ignore[arg-type]
        (ActionPrefix(rows, 1, schedule="exp"), "guidance schedule: unknown, got 'exp'"),  # type: ignore[arg-type]
        (ActionPrefix(rows * np.nan, 1), "action prefix: must be finite"),
        (ActionPrefix(rows, 1, method="vjp"), "has no graph for guidance 'vjp'; export it with --guidance"),
    ):  # fmt: skip
        with pytest.raises(QuantVLAError, match=message):
            policy.predict_action_chunk(observation(), seed=1, prefix=prefix)


def test_a_prefix_longer_than_the_chunk_is_cut() -> None:
    prefix = ActionPrefix(np.ones((9, 2), np.float32), frozen=9)
    guidance = make_guidance(prefix, prefix.actions, (1, HORIZON, 6))
    assert guidance is not None and guidance.target.shape == (1, HORIZON, 6)
    assert guidance.weights.shape == (1, HORIZON, 1) and guidance.target[0, 0].tolist() == [
        1,
        1,
        0,
        0,
        0,
        0,
    ]
