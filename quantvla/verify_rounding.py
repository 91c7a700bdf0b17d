"""How far two correct programs with the same integers may be apart, measured on the engine itself.

A float difference in the last bits moves activations that lie near a rounding boundary to the other
integer; layers after it round other numbers then, and after a few of them the two programs' roundings
have little in common. How much that changes the result depends on the policy, the format and the
frame, so it is measured: the engine against itself, its inputs changed in their last bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantvla.fidelity.action_error import relative_rms
from quantvla.fidelity.trajectories import Frame, Trajectory, visible
from quantvla.progress import Progress
from quantvla.runtime.policy import Policy

Array = NDArray[np.float32]
LAST_BITS = 1e-6
"""Relative change of inputs: what sums in float32 differ by when their terms are added in another order."""


@dataclass(frozen=True)
class RoundingResponse:
    """Relative RMS differences of the engine's velocities at the reference's states: to the reference, and to
    its own with inputs changed in the last bits.
    """

    reference_nrmse: float
    rounding_nrmse: float


def rounding_response(
    policy: Policy,
    frames: Sequence[Frame],
    reference: Sequence[Trajectory],
    seed: int,
    progress: Progress,
) -> RoundingResponse:
    """Run the engine at every state of ``reference`` twice, the second time with its inputs changed."""
    rng, dim = np.random.default_rng(seed), policy.manifest.action.dim
    plain, changed = [], []
    for index, (frame, trajectory) in enumerate(zip(frames, reference, strict=True)):
        progress("rounding", index, len(frames))
        inputs = policy.preprocessor(visible(policy, frame))
        plain.append(_velocities(policy, inputs, trajectory.states))
        nearby = {name: _nudged(value, rng) for name, value in inputs.items()}
        changed.append(_velocities(policy, nearby, _nudged(trajectory.states, rng)))
    expected = np.stack([trajectory.velocities for trajectory in reference])[..., :dim]
    found, other = np.stack(plain)[..., :dim], np.stack(changed)[..., :dim]
    axes = tuple(range(found.ndim))
    return RoundingResponse(
        reference_nrmse=relative_rms(found, expected, axes=axes)[0],
        rounding_nrmse=relative_rms(other, found, axes=axes)[0],
    )


def _velocities(policy: Policy, inputs: Mapping[str, NDArray[Any]], states: Array) -> Array:
    context = policy.run_context(inputs)
    times = policy.manifest.sampler.timesteps
    return np.stack([policy.velocity(context, x, t) for x, t in zip(states, times, strict=True)])


def _nudged(value: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    """Return an array of numbers changed by about `LAST_BITS` of each; other arrays as they are."""
    if value.dtype != np.float32:
        return value
    factor = 1 + np.float32(LAST_BITS) * rng.standard_normal(value.shape, np.float32)
    return np.asarray(value * factor)
