"""A schedule: at which times of the flow the denoise steps of a chunk are taken.

`quantvla schedule` fits and writes one, `quantvla export --schedule` puts it into an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import msgspec

from quantvla.families.base import LoadedPolicy
from quantvla.runtime.errors import explain
from quantvla.runtime.manifest import EulerSampler
from quantvla.runtime.sampler import SAME_TIME

SCHEDULE_VERSION = 1


class ChunkErrors(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Errors of the float policy's normalized chunks against those of its own steps, over the RMS of these.

    ``nrmse``: root of the mean square over all frames; ``mean`` and ``median`` of the frames' own.
    Where the policy has to choose between two motions, few frames make up most of ``nrmse``.
    """

    nrmse: float
    mean: float
    median: float


class ScheduleErrors(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Errors at the fitted times, and with as many equal steps."""

    fitted: ChunkErrors
    equal: ChunkErrors


class Schedule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The content of a schedule file.

    ``times``: where each step starts, and at last where the actions are; one more than steps.
    ``checkpoint_sha256`` and ``own_steps`` are of the float policy it was fitted for.
    """

    version: int
    checkpoint_sha256: str
    own_steps: int
    times: tuple[float, ...]
    on_calibration: ScheduleErrors
    on_heldout: ScheduleErrors
    calibration: str
    calibration_sha256: str
    frames: int
    heldout_frames: int
    seed: int

    @property
    def steps(self) -> int:
        """How many denoise steps a chunk takes."""
        return len(self.times) - 1


def read_schedule(path: Path) -> Schedule:
    """Return the schedule at ``path``; raises `QuantVLAError` if it is not one of this version."""
    try:
        schedule = msgspec.json.decode(path.read_bytes(), type=Schedule)
    except FileNotFoundError as error:
        raise explain(path, "no such file", remedy="make it with `quantvla schedule`") from error
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise explain(
            path, f"not a schedule ({error})", remedy="make it with `quantvla schedule`"
        ) from error
    if schedule.version != SCHEDULE_VERSION:
        raise explain(
            path,
            f"expected a schedule of version {SCHEDULE_VERSION}",
            got=schedule.version,
            remedy="fit it again with this version of quantvla",
        )
    return schedule


def sampler_at(sampler: EulerSampler, times: Sequence[float]) -> EulerSampler:
    """Return the policy's sampler with steps between ``times``.

    Raises `QuantVLAError` unless they run, always in the sampler's direction, from its start to its end.
    """
    start, sizes = sampler.timesteps[0], tuple(b - a for a, b in pairwise(times))
    end = start + sum(sampler.sizes)
    if len(times) < 2 or max(abs(times[0] - start), abs(times[-1] - end)) > SAME_TIME:
        raise explain(
            "schedule",
            f"expected times from {start:g} to {end:g}",
            got=f"{', '.join(f'{t:g}' for t in times) or 'none'}",
            remedy="fit it with `quantvla schedule`",
        )
    falls = end < start
    for index, size in enumerate(sizes):
        if not (size < 0 if falls else size > 0):
            raise explain(
                "schedule",
                f"times must {'fall' if falls else 'rise'} all the way",
                got=f"{times[index]:g} and then {times[index + 1]:g}",
                remedy="fit it with `quantvla schedule`",
            )
    return msgspec.structs.replace(sampler, timesteps=tuple(times[:-1]), step=sizes)


def resampled(loaded: LoadedPolicy, sampler: EulerSampler) -> LoadedPolicy:
    """Return the policy with another sampler of the same stage; weights are shared."""
    stages = tuple(
        replace(stage, repeat=len(sampler.timesteps)) if stage.name == sampler.stage else stage
        for stage in loaded.stages
    )
    return replace(loaded, stages=stages, interface=replace(loaded.interface, sampler=sampler))


def scheduled(loaded: LoadedPolicy, checkpoint_sha256: str, schedule: Schedule) -> LoadedPolicy:
    """Return the policy with the times of ``schedule``.

    ``checkpoint_sha256`` is that of the float checkpoint it comes from. Raises `QuantVLAError` for
    a schedule of another one.
    """
    if schedule.checkpoint_sha256 != checkpoint_sha256:
        raise explain(
            "schedule",
            f"was fitted for another policy, expected one with SHA-256 {checkpoint_sha256[:12]}…",
            got=f"{schedule.checkpoint_sha256[:12]}…",
            remedy="fit one for this policy with `quantvla schedule`",
        )
    return resampled(loaded, sampler_at(loaded.interface.sampler, schedule.times))
