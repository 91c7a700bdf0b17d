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
Observer = Callable[[FloatArray, FloatArray], None]
SAME_TIME = 1e-5
"""Two times closer than this are one, computed in another order."""


def standard_noise(generator: np.random.Generator, shape: tuple[int, ...]) -> FloatArray:
    """Return the next standard normal float32 noise of ``generator``."""
    return generator.standard_normal(shape, dtype=np.float32)


def euler_integrate(
    velocity: Velocity,
    noise: FloatArray,
    timesteps: Sequence[float],
    step: float | Sequence[float],
    observe: Observer | None = None,
) -> FloatArray:
    """Return x after ``x <- x + step * velocity(x, t)`` for each t, in float32.

    noise: (1, horizon, padded action dimension) -> the same shape. ``step``: one for all, or one a
    time. The same arithmetic, in the same order, as lerobot's ``euler_integrate``. ``observe(x, v)``
    sees every step's x and velocity.
    """
    x = noise
    steps = step if isinstance(step, Sequence) else [step] * len(timesteps)
    for t, dt in zip(timesteps, steps, strict=True):
        v = velocity(x, t)
        if observe is not None:
            observe(x, v)
        x = x + np.float32(dt) * v
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
    if steps == own:
        return sampler
    found = _equal_steps(sampler, steps)
    for t in found.timesteps:
        check_time(sampler, t)
    return found


def check_time(sampler: EulerSampler, t: float) -> None:
    """Raise `QuantVLAError` for a time that a stage with tables for its own times was not made for."""
    if _knows(sampler, t):
        return
    own = len(sampler.timesteps)
    steps = [
        n
        for n in range(1, own)
        if all(_knows(sampler, t) for t in _equal_steps(sampler, n).timesteps)
    ]
    raise explain(
        "denoise time",
        f"expected one of the {own} that this engine has tables for",
        got=f"{t:g}",
        remedy=f"use {' or '.join(map(str, [*steps, own]))} steps",
    )


def _knows(sampler: EulerSampler, t: float) -> bool:
    own = sampler.timesteps
    return not sampler.only_own_times or min(abs(t - known) for known in own) <= SAME_TIME


def _equal_steps(sampler: EulerSampler, steps: int) -> EulerSampler:
    step = sum(sampler.sizes) / steps
    if not isinstance(sampler.step, tuple):  # the same bits as ever, without the rounding of a sum
        step = sampler.step * len(sampler.timesteps) / steps
    timesteps = tuple(sampler.timesteps[0] + index * step for index in range(steps))
    return msgspec.structs.replace(sampler, timesteps=timesteps, step=step)
