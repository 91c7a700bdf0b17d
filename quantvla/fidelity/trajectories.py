"""One chunk's denoising, step by step, of an engine and of the staged policy in torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantvla import staged
from quantvla.families.base import LoadedPolicy
from quantvla.progress import Progress
from quantvla.runtime.policy import Policy
from quantvla.runtime.sampler import Observer

Array = NDArray[np.float32]
Frame = dict[str, object]


@dataclass(frozen=True)
class Trajectory:
    """One chunk's denoising: states and velocities (steps, 1, horizon, padded), chunk (horizon, dim), normalized."""

    states: Array
    velocities: Array
    chunk: Array


def visible(policy: Policy, frame: Frame) -> Frame:
    """Return the entries of a recorded observation that the policy reads."""
    return {key: value for key, value in frame.items() if key in policy.preprocessor.keys}


def engine_trajectories(
    policy: Policy,
    frames: Sequence[Frame],
    noises: Sequence[Array],
    what: str,
    progress: Progress,
) -> list[Trajectory]:
    """Return the engine's trajectory for every frame and its noise."""
    action, found = policy.manifest.action, []
    for index, (frame, noise) in enumerate(zip(frames, noises, strict=True)):
        progress(what, index, len(frames))
        prediction = policy.predict(visible(policy, frame), noise=noise)
        found.append(
            Trajectory(prediction.states, prediction.velocities, action.of(prediction.normalized))
        )
    return found


def loop_difference(policy: Policy, frames: Sequence[Frame], noises: Sequence[Array]) -> float:
    """Return how far chunks sampled in one call, as on the robot, are from those sampled step by step.

    The largest difference, over the largest action.
    """
    worst = largest = 0.0
    for frame, noise in zip(frames, noises, strict=True):
        steps = policy.predict(visible(policy, frame), noise=noise)
        whole = policy.sample_chunk(steps.tensors, noise=noise)
        worst = max(worst, float(np.abs(whole - steps.actions).max()))
        largest = max(largest, float(np.abs(steps.actions).max()))
    return worst / largest if worst else 0.0


def staged_trajectories(
    loaded: LoadedPolicy,
    frames: Sequence[Frame],
    noises: Sequence[Array],
    what: str,
    progress: Progress,
) -> list[Trajectory]:
    """Return the trajectory of the policy run stage by stage in torch, for every frame and its noise."""
    preprocess = staged.make_preprocessor(loaded.interface)
    action, found = loaded.interface.action, []
    for index, (frame, noise) in enumerate(zip(frames, noises, strict=True)):
        progress(what, index, len(frames))
        context = staged.run_context(loaded, staged.prepare(preprocess, frame))
        steps: list[tuple[Array, Array]] = []
        final = staged.sample(loaded, context, noise, _append_to(steps))
        states, velocities = (np.stack(column) for column in zip(*steps, strict=True))
        found.append(Trajectory(states, velocities, action.of(final)))
    return found


def engine_velocities(
    policy: Policy,
    frames: Sequence[Frame],
    reference: Sequence[Trajectory],
    what: str,
    progress: Progress,
) -> Array:
    """Return the engine's velocities at the reference's states (teacher-forced): (frames, steps, 1, horizon, padded)."""
    times = policy.manifest.sampler.timesteps
    found = []
    for index, (frame, trajectory) in enumerate(zip(frames, reference, strict=True)):
        progress(what, index, len(frames))
        tensors = policy.prepare(visible(policy, frame))
        steps = zip(trajectory.states, times, strict=True)
        found.append(np.stack([policy.velocity(tensors, x, t) for x, t in steps]))
    return np.stack(found)


def _append_to(steps: list[tuple[Array, Array]]) -> Observer:
    return lambda x, v: steps.append((x, v))
