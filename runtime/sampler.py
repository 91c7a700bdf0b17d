"""Noise, and the integration of a velocity field from it to actions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.errors import explain
from quantvla.runtime.manifest import EulerSampler

FloatArray = NDArray[np.float32]
Velocity = Callable[[FloatArray, float], FloatArray]
_SAME_TIME = 1e-5  # two times closer than this are one, computed in another order
Observer = Callable[[FloatArray, FloatArray], None]


def standard_noise(generator: np.random.Generator, shape: tuple[int, ...]) -> FloatArray:
    """Return the next standard normal float32 noise of ``generator``."""
    return generator.standard_normal(shape, dtype=np.float32)


def euler_integrate(
    velocity: Velocity,
    noise: FloatArray,
    timesteps: Sequence[float],
    step: float,
    observe: Observer | None = None,
) -> FloatArray:
    """Return x after ``x <- x + step * velocity(x, t)`` for each t, in float32.

    noise: (1, horizon, padded action dimension) -> the same shape. The same arithmetic, in the
    same order, as lerobot's ``euler_integrate``. ``observe(x, v)`` sees every step's x and velocity.
    """
    x = noise
    dt = np.float32(step)
    for t in timesteps:
        v = velocity(x, t)
        if observe is not None:
            observe(x, v)
        x = x + dt * v
    return x


def with_steps(sampler: EulerSampler, steps: int) -> EulerSampler:
    """Return the sampler that covers the same span of time in ``steps`` equal steps.

    Raises `QuantVLAError` for a number below one or one above the policy's own, and for one that
    asks for times the policy's stage does not know.
    """
    own = len(sampler.timesteps)
    if not 1 <= steps <= own:
        raise explain(
            "denoise steps",
            f"expected 1 to {own}, which the policy was made for",
            got=steps,
            remedy="choose a number in that range",
        )
    step = sampler.step * own / steps
    timesteps = tuple(sampler.timesteps[0] + index * step for index in range(steps))
    if sampler.only_own_times:
        for t in timesteps:
            check_time(sampler, t)
    return msgspec.structs.replace(sampler, timesteps=timesteps, step=step)


def check_time(sampler: EulerSampler, t: float) -> None:
    """Raise `QuantVLAError` for a time that a stage with tables for its own times was not made for."""
    if sampler.only_own_times and min(abs(t - own) for own in sampler.timesteps) > _SAME_TIME:
        own = len(sampler.timesteps)
        steps = [number for number in range(1, own) if own % number == 0]
        raise explain(
            "denoise time",
            f"expected one of the {own} that this engine has tables for",
            got=f"{t:g}",
            remedy=f"use {' or '.join(map(str, [*steps, own]))} steps",
        )
