"""Paired errors: two policies on the same observation and the same noise.

All chunks are normalized actions (the policy's own units) of shape (samples, horizon, dim), where
entry i of both arrays has the same observation and noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.manifest import ActionSpec
from quantvla.runtime.processing_steps import FeatureStatistics

Array = NDArray[np.float32]
_TINY = 1e-12
_GRIPPER = "gripper"
SWITCHED = 0.1
"""A chunk whose error is a tenth of the actions' RMS has gone another way, it is not the same motion rounded."""
FLIP_MARGIN = 0.25
"""A quarter of the recorded standard deviation: commands that rest at the midpoint cross it without meaning it."""


class Gripper(msgspec.Struct, frozen=True):
    """Which action dimension opens and closes the gripper, and where it changes between the two (normalized)."""

    dimension: int
    midpoint: float


class ActionError(msgspec.Struct, frozen=True, kw_only=True):
    """Paired error of action chunks. ``nrmse``: RMS error over the RMS of the reference's actions.

    A few chunks in which a policy with several ways to act takes another one can make most of it; so
    ``nrmse_median`` is the error of the median chunk over the same RMS, and ``switched`` the share of
    chunks that err by more than `SWITCHED` of it.
    ``nrmse_executed`` looks at the steps that are run before the next chunk only. Cosines are of
    whole chunks. ``gripper_flips``: share of executed steps on which one policy opens and the
    other closes the gripper (see `gripper_flips`); None where no dimension is known to be one.
    """

    cosine_mean: float
    cosine_p5: float
    cosine_min: float
    nrmse: float
    nrmse_median: float
    switched: float
    nrmse_executed: float
    nrmse_per_dimension: tuple[float, ...]
    max_abs: float
    gripper_flips: float | None


def action_error(
    found: Array, reference: Array, *, execute: int, gripper: Gripper | None = None
) -> ActionError:
    """Return the error of ``found`` against ``reference``, both (samples, horizon, dim)."""
    cosine = chunk_cosines(found, reference)
    each = chunk_errors(found, reference)
    run, run_reference = found[:, :execute], reference[:, :execute]
    return ActionError(
        cosine_mean=float(cosine.mean()),
        cosine_p5=float(np.percentile(cosine, 5)),
        cosine_min=float(cosine.min()),
        nrmse=relative_rms(found, reference, axes=(0, 1, 2))[0],
        nrmse_median=float(np.median(each)),
        switched=float((each > SWITCHED).mean()),
        nrmse_executed=relative_rms(run, run_reference, axes=(0, 1, 2))[0],
        nrmse_per_dimension=relative_rms(found, reference, axes=(0, 1)),
        max_abs=float(np.abs(found - reference).max()),
        gripper_flips=None if gripper is None else gripper_flips(run, run_reference, gripper),
    )


def chunk_errors(found: Array, reference: Array) -> NDArray[np.float64]:
    """Return the RMS error of every chunk over the RMS of all of the reference's actions: (samples,)."""
    error = np.square(found.astype(np.float64) - reference).mean((1, 2))
    scale = np.square(reference.astype(np.float64)).mean()
    errors: NDArray[np.float64] = np.sqrt(error / np.maximum(scale, _TINY))
    return errors


def chunk_cosines(found: Array, reference: Array) -> NDArray[np.float64]:
    """Return the cosine of every pair of chunks: (samples,)."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (found, reference))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines: NDArray[np.float64] = (a * b).sum(1) / np.maximum(norms, _TINY)
    return cosines


def relative_rms(found: Array, reference: Array, *, axes: tuple[int, ...]) -> tuple[float, ...]:
    """Return the RMS error over the RMS of the reference, with ``axes`` averaged out."""
    error = np.square(found.astype(np.float64) - reference).mean(axes)
    scale = np.square(reference.astype(np.float64)).mean(axes)
    return tuple(np.atleast_1d(np.sqrt(error / np.maximum(scale, _TINY))).tolist())


def velocity_error(found: Array, reference: Array) -> tuple[float, ...]:
    """Return the relative RMS error of the velocity at each step: (samples, steps, ...) -> (steps,)."""
    axes = (0, *range(2, found.ndim))
    return relative_rms(found, reference, axes=axes)


def gripper_flips(found: Array, reference: Array, gripper: Gripper) -> float:
    """Return the share of steps on which the gripper commands lie on either side of the midpoint and differ by
    more than `FLIP_MARGIN`.
    """
    ours, theirs = (x[..., gripper.dimension] for x in (found, reference))
    opposite = (ours > gripper.midpoint) != (theirs > gripper.midpoint)
    return float((opposite & (np.abs(ours - theirs) > FLIP_MARGIN)).mean())


def find_gripper(
    names: Sequence[str], action: ActionSpec, statistics: FeatureStatistics | None
) -> Gripper | None:
    """Return the gripper among the action's dimensions: the one whose name says so, if exactly one does.

    Its midpoint is the middle of the recorded range where the statistics have one, else physical zero.
    """
    named = action.names or tuple(names)
    found = [i for i, name in enumerate(named) if _GRIPPER in name.lower()]
    if len(found) != 1 or found[0] >= action.dim:
        return None
    return Gripper(found[0], _normalized_midpoint(found[0], statistics))


def _normalized_midpoint(dimension: int, statistics: FeatureStatistics | None) -> float:
    if statistics is None:
        return 0.0
    middle = 0.0
    if statistics.min is not None and statistics.max is not None:
        middle = (statistics.min[dimension] + statistics.max[dimension]) / 2
    if statistics.mean is None or statistics.std is None:
        return 0.0  # normalized by its range: the middle of the range is zero
    return (middle - statistics.mean[dimension]) / max(statistics.std[dimension], _TINY)
