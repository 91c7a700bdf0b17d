from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from lerobot.policies.common.flow_matching import euler_integrate as lerobot_euler

from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.manifest import EulerSampler
from quantvla.runtime.sampler import check_time, euler_integrate, with_steps

STEPS = 10
TIMESTEPS = tuple(1.0 + k * (-1.0 / STEPS) for k in range(STEPS))


def test_equals_lerobot_to_the_bit() -> None:
    noise = np.random.default_rng(0).standard_normal((1, 50, 32)).astype(np.float32)
    expected = lerobot_euler(
        lambda x, t: x * 0.5 - t[:, None, None], torch.from_numpy(noise), STEPS
    ).numpy()
    found = euler_integrate(
        lambda x, t: x * np.float32(0.5) - np.float32(t), noise, TIMESTEPS, -1.0 / STEPS
    )
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


def test_closed_form_of_a_linear_field() -> None:
    noise = np.ones((1, 2, 3), np.float32)
    found = euler_integrate(lambda x, t: x, noise, TIMESTEPS, -1.0 / STEPS)
    np.testing.assert_allclose(found, (1 - 1 / STEPS) ** STEPS, rtol=1e-6)


def test_observer_sees_every_step_and_noise_is_left_alone() -> None:
    noise = np.zeros((1, 1, 1), np.float32)
    seen: list[tuple[float, float]] = []
    euler_integrate(
        lambda x, t: np.full_like(x, t),
        noise,
        (1.0, 0.5),
        -0.5,
        lambda x, v: seen.append((x.item(), v.item())),
    )
    assert seen == [(0.0, 1.0), (-0.5, 0.5)]
    assert noise.item() == 0


SAMPLER = EulerSampler(
    stage="denoise", state="x", time="t", velocity="v", timesteps=TIMESTEPS, step=-1.0 / STEPS, noise_shape=(1, 2, 3)
)  # fmt: skip


def test_fewer_steps_cover_the_same_time() -> None:
    found = with_steps(SAMPLER, 4)
    assert found.timesteps == (1.0, 0.75, 0.5, 0.25) and found.step == -0.25
    assert with_steps(SAMPLER, STEPS) == SAMPLER
    for steps in (0, STEPS + 1):
        with pytest.raises(QuantVLAError, match=f"denoise steps: expected 1 to 10, .* got {steps}"):
            with_steps(SAMPLER, steps)


FITTED = msgspec.structs.replace(SAMPLER, timesteps=(1.0, 0.5, 0.2), step=(-0.5, -0.3, -0.2))


def test_steps_of_different_sizes() -> None:
    noise = np.ones((1, 2, 3), np.float32)
    found = euler_integrate(lambda x, t: x, noise, FITTED.timesteps, FITTED.step)
    np.testing.assert_allclose(found, 0.5 * 0.7 * 0.8, rtol=1e-6)
    assert with_steps(FITTED, 3) == FITTED
    assert with_steps(FITTED, 2).timesteps == (1.0, 0.5)
    with pytest.raises(ValueError, match="zip"):
        euler_integrate(lambda x, t: x, noise, FITTED.timesteps, (-0.5, -0.5))


def test_tables_know_the_times_of_their_schedule_only() -> None:
    tabulated = msgspec.structs.replace(FITTED, only_own_times=True)
    check_time(tabulated, 0.2)
    with pytest.raises(
        QuantVLAError, match=r"one of the 3 .* tables for, got 0\.3; use 1 or 2 or 3 steps"
    ):
        check_time(tabulated, 0.3)
    uneven = msgspec.structs.replace(tabulated, timesteps=(1.0, 0.6, 0.2), step=(-0.4, -0.4, -0.2))
    with pytest.raises(QuantVLAError, match=r"got 0\.5; use 1 or 3 steps"):
        with_steps(uneven, 2)
