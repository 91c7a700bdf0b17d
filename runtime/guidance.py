"""Steering the flow so that a new chunk continues the one in progress (real-time chunking, arXiv 2506.07339).

The first actions of a new chunk are already decided: the robot runs the old chunk while the new
one is computed. Guidance pulls those rows, softly also the following ones, to the old chunk while
the sampler integrates. Time runs from 1 (noise) to 0 (actions), as in the sampler.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.errors import explain

FloatArray = NDArray[np.float32]
Schedule = Literal["linear", "exponential", "ones", "zeros"]
Method = Literal["prefix", "forward", "vjp"]
METHODS: tuple[Method, ...] = ("prefix", "forward", "vjp")
SCHEDULES: tuple[Schedule, ...] = ("linear", "exponential", "ones", "zeros")


@dataclass(frozen=True)
class ActionPrefix:
    """The old chunk's actions from the new chunk's first tick on, and how strongly they bind.

    actions: (n, dim) physical units, what the robot will run anyway or would have run. ``frozen``
    rows bind fully (they are run before the new chunk can arrive); the weight then falls to zero
    at row ``overlap`` (None: at the end of ``actions``).

    ``method`` ``prefix`` moves bound rows along the straight path from their noise to their
    target, so that frozen rows come out exactly; ``forward`` adds the guidance term with the
    identity for the Jacobian of the denoised estimate, as lerobot does; ``vjp`` takes the true
    Jacobian, which needs an engine exported with `--guidance`. ``max_weight`` bounds the guidance
    term of the latter two.
    """

    actions: FloatArray
    frozen: int
    overlap: int | None = None
    schedule: Schedule = "exponential"
    method: Method = "prefix"
    max_weight: float = 10.0


@dataclass(frozen=True)
class Guidance:
    """An action prefix in the model's space: target (1, horizon, padded) and weights (1, horizon, 1)."""

    target: FloatArray
    weights: FloatArray
    method: Method
    max_weight: float

    def along_path(self, noise: FloatArray, v: FloatArray) -> FloatArray:
        """Return ``v`` with bound rows replaced by the straight path's velocity, ``noise - target``."""
        return v + self.weights * ((noise - self.target) - v)

    def correction(self, x: FloatArray, v: FloatArray, t: float) -> FloatArray:
        """Return the weighted error of the denoised estimate ``x - t v``: shape of x."""
        error: FloatArray = (self.target - (x - np.float32(t) * v)) * self.weights
        return error

    def corrected(self, v: FloatArray, correction: FloatArray, t: float) -> FloatArray:
        """Return the guided velocity."""
        return v - np.float32(guidance_weight(t, self.max_weight)) * correction


def guidance_weight(t: float, max_weight: float) -> float:
    """Return the guidance weight at flow time ``t`` in (0, 1]: equation 2 of arXiv 2506.07339, clipped."""
    done = 1.0 - t
    if done <= 0.0:
        return max_weight
    return min(t / done * (t * t + done * done) / (t * t), max_weight)


def prefix_weights(frozen: int, end: int, horizon: int, schedule: Schedule) -> FloatArray:
    """Return how strongly each row is bound, (horizon,) in [0, 1]: 1 before ``frozen``, 0 from ``end`` on.

    Between them the weight is 1 (``ones``), 0 (``zeros``), falls linearly, or as
    ``w expm1(w) / (e - 1)`` of the linear weight (``exponential``, equation 5 of the paper).
    """
    end = max(0, min(end, horizon))
    frozen = max(0, min(frozen, end))
    weights = np.zeros(horizon, dtype=np.float64)
    weights[:frozen] = 1.0
    between = end - frozen
    if schedule == "ones":
        weights[frozen:end] = 1.0
    elif schedule != "zeros":
        falling = np.linspace(1.0, 0.0, between + 2)[1:-1]
        if schedule == "exponential":
            falling = falling * np.expm1(falling) / (math.e - 1.0)
        weights[frozen:end] = falling
    return weights.astype(np.float32)


def make_guidance(
    prefix: ActionPrefix, normalized: FloatArray, shape: tuple[int, ...]
) -> Guidance | None:
    """Return the guidance of a prefix whose actions are ``normalized`` (n, dim); None if it binds nothing.

    ``shape`` is that of the noise, (1, horizon, padded): missing rows have weight 0, padded
    dimensions the target 0, which is what the policies are trained with. Raises `QuantVLAError`
    for a method or schedule that does not exist and a prefix that is not finite.
    """
    _check(prefix, normalized)
    horizon = shape[1]
    rows = min(len(normalized), horizon)
    overlap = rows if prefix.overlap is None else min(prefix.overlap, rows)
    weights = prefix_weights(prefix.frozen, overlap, horizon, prefix.schedule)
    if not weights.any():
        return None
    target = np.zeros(shape, dtype=np.float32)
    target[0, :rows, : normalized.shape[1]] = normalized[:rows]
    return Guidance(target, weights[None, :, None], prefix.method, prefix.max_weight)


def _check(prefix: ActionPrefix, normalized: FloatArray) -> None:
    for what, value, known in (
        ("guidance method", prefix.method, METHODS),
        ("guidance schedule", prefix.schedule, SCHEDULES),
    ):
        if value not in known:
            raise explain(what, "unknown", got=repr(value), remedy=f"known: {', '.join(known)}")
    if not np.isfinite(normalized).all():
        raise explain(
            "action prefix",
            "must be finite",
            got="NaN or infinity",
            remedy="start without the old chunk",
        )
