"""Fitting the times of few denoise steps so that the chunk comes out as with the policy's own number.

The field of a flow policy bends most near the actions, so that equal steps waste evaluations where
it is straight. The times between start and end are the only freedom. What is minimized is the error of
the whole chunk, not of single steps, because errors of steps partly cancel: the sum of its nrmse and of
its mean over frames. The nrmse alone is made by the few frames where the policy chooses between two
motions, and fits those; the mean alone gives them up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from quantvla import staged
from quantvla.calib_sets import CalibrationSet, check_robot, limit
from quantvla.calibrate import frame_noise
from quantvla.families.base import LoadedPolicy
from quantvla.progress import Progress
from quantvla.runtime.errors import explain
from quantvla.runtime.files import sha256_tree
from quantvla.runtime.manifest import EulerSampler
from quantvla.runtime.sampler import euler_integrate, with_steps
from quantvla.schedule import (
    SCHEDULE_VERSION,
    ChunkErrors,
    Schedule,
    ScheduleErrors,
    resampled,
    sampler_at,
)

Array = NDArray[np.float32]
POWERS = (0.8, 1.0, 1.2, 1.5, 2.0)
"""Where the search starts: the best of times ``(1 - i/n)^p``."""
EVALUATIONS_PER_TIME = 25
FRAMES_AT_ONCE = 16
_DECIMALS = 5  # of the times in a file: far finer than the error changes


@dataclass(frozen=True)
class _Frames:
    """Recorded frames after the stages before the sampler, stacked where the policy's stage can be, and the
    policy's own normalized chunks (frames, horizon, dim).
    """

    calls: tuple[staged.Tensors, ...]
    chunks: Array

    def errors(self, loaded: LoadedPolicy, sampler: EulerSampler) -> ChunkErrors:
        """Return the errors of the chunks with ``sampler``."""
        found = sample_calls(resampled(loaded, sampler), self.calls)
        squares = np.square(found - self.chunks, dtype=np.float64).mean((1, 2))
        scale = np.square(self.chunks, dtype=np.float64).mean()
        frames = np.sqrt(squares / scale)
        return ChunkErrors(
            float(np.sqrt(squares.mean() / scale)), float(frames.mean()), float(np.median(frames))
        )


def sample_calls(loaded: LoadedPolicy, calls: Sequence[staged.Tensors]) -> Array:
    """Return the normalized chunks (frames, horizon, dim) of calls of the sampler's stage, from their states."""
    sampler, dim = loaded.interface.sampler, loaded.interface.action.dim
    stage = loaded.stage(sampler.stage)
    chunks = []
    for call in calls:
        noise = call[sampler.state]

        def velocity(x: Array, t: float, call: staged.Tensors = call) -> Array:
            times = np.full(len(x), t, np.float32)
            known = {**call, sampler.state: x, sampler.time: times}
            return staged.run_stage(stage, known)[sampler.velocity]

        final = euler_integrate(velocity, noise, sampler.timesteps, sampler.step)
        chunks.append(final[:, :, :dim])
    return np.concatenate(chunks)


def fit_schedule(
    loaded: LoadedPolicy,
    recorded: CalibrationSet,
    steps: int,
    *,
    frames: int,
    heldout_frames: int,
    seed: int,
    progress: Progress = lambda _what, _done, _total: None,
) -> Schedule:
    """Return ``steps`` times fitted on calibration frames of ``recorded``, with errors there and held out.

    Raises `QuantVLAError` for a number of steps that leaves nothing to fit, and a set of another robot.
    """
    sampler = loaded.interface.sampler
    own = len(sampler.timesteps)
    if not 2 <= steps < own:
        raise explain(
            "schedule steps",
            f"expected 2 to {own - 1}: less than the policy's {own}, and one step has no times to fit",
            got=steps,
            remedy="choose a number in that range",
        )
    interface = loaded.interface
    check_robot(recorded.robot, interface.cameras, interface.state, where=recorded.card.name)
    chosen = limit(recorded, frames=frames, heldout_frames=heldout_frames, seed=seed)
    parts = [chosen.part("calibration"), chosen.part("heldout")]
    fit, judge = (
        _prepare(loaded, part, seed + offset, progress) for offset, part in enumerate(parts)
    )
    times = _search(loaded, fit, steps, progress)
    fitted, equal = sampler_at(sampler, times), with_steps(sampler, steps)
    return Schedule(
        version=SCHEDULE_VERSION, checkpoint_sha256=sha256_tree(loaded.directory), own_steps=own, times=times,
        on_calibration=ScheduleErrors(fit.errors(loaded, fitted), fit.errors(loaded, equal)),
        on_heldout=ScheduleErrors(judge.errors(loaded, fitted), judge.errors(loaded, equal)),
        calibration=recorded.card.name, calibration_sha256=parts[0].checksum,
        frames=len(parts[0]), heldout_frames=len(parts[1]), seed=seed,
    )  # fmt: skip


def _prepare(loaded: LoadedPolicy, part: CalibrationSet, seed: int, progress: Progress) -> _Frames:
    """Run the stages before the sampler, and the sampler at the policy's own times."""
    preprocess, sampler = staged.make_preprocessor(loaded.interface), loaded.interface.sampler
    stage, start = loaded.stage(sampler.stage), np.array([sampler.timesteps[0]], np.float32)
    names = [spec.name for spec in stage.inputs]
    calls = []
    for index, frame in enumerate(part):
        progress("float policy", index, len(part))
        known = staged.run_context(loaded, staged.prepare(preprocess, frame.observation))
        noise = frame_noise(seed, index, sampler.noise_shape)
        known |= {sampler.state: noise, sampler.time: start}
        calls.append({name: known[name] for name in names})
    progress("float policy", len(part), len(part))
    stacks = tuple(
        call
        for first in range(0, len(calls), FRAMES_AT_ONCE)
        for call in staged.stacked(stage, calls[first : first + FRAMES_AT_ONCE])
    )
    return _Frames(stacks, sample_calls(loaded, stacks))


def _search(
    loaded: LoadedPolicy, frames: _Frames, steps: int, progress: Progress
) -> tuple[float, ...]:
    """Return the best times found: a power law's, then refined by Nelder and Mead's simplex."""
    sampler = loaded.interface.sampler
    budget = EVALUATIONS_PER_TIME * (steps - 1)
    done = 0

    def error(shares: NDArray[np.float64]) -> float:
        nonlocal done
        progress("fitting times", min(done, budget), budget)
        done += 1
        found = frames.errors(loaded, sampler_at(sampler, _times(sampler, shares)))
        return found.nrmse + found.mean

    starts = [np.diff(-((1 - np.arange(steps + 1) / steps) ** p)) for p in POWERS]
    start = np.log(min(starts, key=lambda shares: error(np.log(shares))))
    free = steps - 1  # shares are relative: the last one stays
    simplex = np.vstack([start[:free], start[:free] + 0.3 * np.eye(free)])
    found = minimize(
        lambda z: error(np.append(z, start[free:])), start[:free], method="Nelder-Mead",
        options={"maxfev": budget, "initial_simplex": simplex, "xatol": 1e-3, "fatol": 1e-6},
    )  # fmt: skip
    progress("fitting times", budget, budget)
    return _times(sampler, np.append(found.x, start[free:]))


def _times(
    sampler: EulerSampler, shares: Sequence[float] | NDArray[np.float64]
) -> tuple[float, ...]:
    """Return times from the sampler's start to its end whose gaps are as ``exp(shares)``."""
    gaps = np.exp(np.asarray(shares) - np.max(shares))
    start, span = sampler.timesteps[0], sum(sampler.sizes)
    inner = start + span * np.cumsum(gaps)[:-1] / gaps.sum()
    return (start, *(round(float(t), _DECIMALS) for t in inner), round(start + span, _DECIMALS))
