from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from tiny_engine import (
    ACTION_DIM,
    HORIZON,
    PADDED,
    RATE,
    STEPS,
    change_manifest,
    context_of,
    observation,
)

from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.policy import Policy
from quantvla.runtime.processing_steps import FeatureStatistics


def _noise(seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, HORIZON, PADDED)).astype(np.float32)


def test_chunk_has_the_closed_form(policy: Policy) -> None:
    noise = _noise()
    prediction = policy.predict(observation(), noise=noise)
    context = float(context_of(prediction.tensors))
    x = noise.astype(np.float64)
    for k in range(STEPS):
        x = x - (RATE * x + context + (1 - k / STEPS)) / STEPS
    np.testing.assert_allclose(prediction.normalized, x, atol=1e-5)
    expected = x[0, :, :ACTION_DIM] * np.array([2.0, 0.1]) + np.array([10.0, -3.0])
    np.testing.assert_allclose(prediction.actions, expected, atol=1e-5)
    assert prediction.actions.shape == (HORIZON, ACTION_DIM)
    assert prediction.actions.dtype == np.float32


def test_same_noise_same_actions(policy: Policy) -> None:
    obs, noise = observation(), _noise()
    first = policy.predict_action_chunk(obs, noise=noise)
    policy.predict_action_chunk(observation(1))
    np.testing.assert_array_equal(first, policy.predict_action_chunk(obs, noise=noise[0]))
    np.testing.assert_array_equal(first, policy.predict(obs, noise=noise).actions)
    assert not np.array_equal(first, policy.predict_action_chunk(observation(1), noise=noise))


def test_noise_is_numpys_default_generator(policy: Policy) -> None:
    obs = observation()
    noise = np.random.default_rng(5).standard_normal((1, HORIZON, PADDED), dtype=np.float32)
    np.testing.assert_array_equal(policy.sample_noise(5), noise)
    np.testing.assert_array_equal(
        policy.predict_action_chunk(obs, seed=5), policy.predict_action_chunk(obs, noise=noise)
    )


def test_unseeded_noise_is_reproducible(pristine_engine: Path) -> None:
    obs = observation()
    with (
        Policy.from_pretrained(pristine_engine) as one,
        Policy.from_pretrained(str(pristine_engine)) as other,
    ):
        one.warm_up()
        chunks = [one.predict_action_chunk(obs) for _ in range(2)]
        np.testing.assert_array_equal(chunks, [other.predict_action_chunk(obs) for _ in range(2)])
        assert not np.array_equal(chunks[0], chunks[1])
        one.reset(seed=0)
        np.testing.assert_array_equal(chunks[0], one.predict_action_chunk(obs))


def test_select_action_goes_through_the_queue(policy: Policy) -> None:
    execute = policy.manifest.action.execute
    chunk = policy.predict_action_chunk(observation(), seed=1)
    actions = [policy.select_action(observation(), seed=1)]
    # In between the observation is not looked at.
    actions += [policy.select_action({}) for _ in range(execute - 1)]
    np.testing.assert_array_equal(actions, chunk[:execute])
    with pytest.raises(QuantVLAError, match="is missing"):
        policy.select_action({})


def test_reset_forgets_the_queue(policy: Policy) -> None:
    policy.select_action(observation(), seed=1)
    policy.reset()
    expected = policy.predict_action_chunk(observation(), seed=2)[0]
    np.testing.assert_array_equal(policy.select_action(observation(), seed=2), expected)


def test_prediction_and_velocity_agree(policy: Policy) -> None:
    prediction = policy.predict(observation(), seed=0)
    timesteps = policy.manifest.sampler.timesteps
    assert prediction.states.shape == (STEPS, 1, HORIZON, PADDED)
    for x, t, v in zip(prediction.states, timesteps, prediction.velocities, strict=True):
        np.testing.assert_array_equal(policy.velocity(prediction.tensors, x, t), v)
    tensors = policy.prepare(observation())
    assert tensors.keys() == prediction.tensors.keys()
    assert tensors.keys() == {"images", "state", "tokens", "mask", "features", "context"}


def test_velocity_checks_x(policy: Policy) -> None:
    tensors = policy.prepare(observation())
    with pytest.raises(QuantVLAError, match=r"velocity x: expected float32 of shape \(1, 4, 6\)"):
        policy.velocity(tensors, np.zeros((1, HORIZON, PADDED)), 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (np.zeros((1, HORIZON, ACTION_DIM)), r"shape \(1, 4, 6\) or \(4, 6\), got float64 \(1, 4,"),
        (np.zeros((2, HORIZON, PADDED)), r"got float64 \(2, 4, 6\); sample it"),
        (np.zeros((HORIZON, PADDED), int), "expected floats of shape .*got int64"),
        (np.full((HORIZON, PADDED), np.nan), "must be finite"),
    ],
)
def test_bad_noise(policy: Policy, noise: np.ndarray, message: str) -> None:
    with pytest.raises(QuantVLAError, match=f"^noise: .*{message}"):
        policy.predict_action_chunk(observation(), noise=noise)


def test_noise_and_seed_exclude_each_other(policy: Policy) -> None:
    with pytest.raises(QuantVLAError, match="noise: given together with a seed, got 1"):
        policy.predict_action_chunk(observation(), noise=_noise(), seed=1)


def test_use_after_close(pristine_engine: Path) -> None:
    with Policy.from_pretrained(pristine_engine) as policy:
        policy.select_action(observation())
    policy.close()
    calls = [policy.select_action, policy.predict_action_chunk, policy.prepare, policy.predict]
    for call in calls:
        with pytest.raises(QuantVLAError, match="the policy was closed; load it again"):
            call(observation())


def test_actions_that_are_not_finite_are_refused(engine: Path) -> None:
    huge = FeatureStatistics(mean=(0.0, 0.0), std=(3e38, 3e38))
    statistics = change_manifest(engine).statistics | {"action": huge}
    change_manifest(engine, statistics=statistics)
    with (
        Policy.from_pretrained(engine) as policy,
        pytest.raises(
            QuantVLAError, match="actions must be finite, got NaN or infinity; do not run them"
        ),
        np.errstate(over="ignore"),
    ):
        policy.predict_action_chunk(observation(), noise=_noise() * 100)


def test_timing_counts_every_run(policy: Policy) -> None:
    policy.predict_action_chunk(observation())
    with policy.timing() as durations:
        policy.predict_action_chunk(observation())
        policy.predict_action_chunk(observation())
    policy.predict_action_chunk(observation())
    assert {name: len(runs) for name, runs in durations.items()} == {
        "preprocess": 2,
        "vision": 2,
        "prefix": 2,
        "denoise": 2 * STEPS,
        "chunk": 2,
    }
    assert all(run > 0 for runs in durations.values() for run in runs)


def test_blank_observation_without_statistics(engine: Path) -> None:
    manifest = change_manifest(engine)
    images, state, text = manifest.preprocess
    change_manifest(
        engine,
        preprocess=(images, msgspec.structs.replace(state, mode="identity"), text),
        statistics={"action": manifest.statistics["action"]},
    )
    with Policy.from_pretrained(engine) as policy:
        policy.warm_up(2)
