"""`quantvla compare`: any number of arms against one reference, on the same observations and noises."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
from numpy.typing import NDArray

import quantvla
from quantvla.calib_sets import CalibrationSet, check_robot
from quantvla.evaluate.arms import Arm
from quantvla.fidelity.action_error import (
    ActionError,
    Gripper,
    action_error,
    find_gripper,
    velocity_error,
)
from quantvla.fidelity.distribution import DistributionError, distribution_error
from quantvla.fidelity.recording import Draws, Task, read_draws, record, recording_directory
from quantvla.fidelity.samplers import Described, open_sampler
from quantvla.fidelity.smoothness import Smoothness, chunk_smoothness, pool
from quantvla.progress import Progress
from quantvla.runtime.errors import explain
from quantvla.runtime.machine import physical_cores
from quantvla.runtime.processing_steps import command_statistics

Array = NDArray[np.float32]


class ArmComparison(msgspec.Struct, frozen=True, kw_only=True):
    """One arm against the reference. ``error`` and ``velocity_*`` are paired (same observation, same noise),
    over all noises and over the first one; ``distribution`` is over the draws of each observation.
    """

    kind: str
    sha256: str
    error: ActionError
    velocity_teacher_forced: tuple[float, ...]
    velocity_free_running: tuple[float, ...]
    distribution: DistributionError
    smoothness: Smoothness


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """What the arms are compared with."""

    name: str
    kind: str
    sha256: str
    smoothness: Smoothness


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `quantvla compare`; its JSON is what ``--json`` prints."""

    reference: Reference
    arms: dict[str, ArmComparison]
    frames: int
    noises: int
    set: str
    set_sha256: str
    seed: int
    execute: int
    dimensions: tuple[str, ...]
    versions: dict[str, str]


@dataclass(frozen=True)
class ComparisonPlan:
    """How much: ``noises`` draws per frame, ``permutations`` of the test, in ``processes`` processes."""

    noises: int = 32
    seed: int = 0
    permutations: int = 999
    processes: int = 1


def compare(
    reference: Arm,
    arms: Sequence[Arm],
    heldout: CalibrationSet,
    plan: ComparisonPlan,
    *,
    work: Path | None = None,
    progress: Progress = lambda _what, _done, _total: None,
) -> Comparison:
    """Sample every arm on the frames of ``heldout`` and compare it with ``reference``.

    Samples are kept in ``work`` (None: a temporary directory), one file a frame; frames that are
    there are not sampled again. Raises `QuantVLAError` for arms of different robots, a set of
    another robot, names used twice, and too few noises.
    """
    _check_arms(reference, arms)
    with open_sampler(reference, threads=1) as opened:
        description = opened.description
    check_robot(heldout.robot, description.cameras, description.state, where=heldout.card.name)
    names = _dimension_names(heldout, description)
    statistics = command_statistics(description.postprocess, description.statistics)
    gripper = find_gripper(names, description.action, statistics)
    execute = description.action.execute
    with ExitStack() as stack:
        work = work or Path(stack.enter_context(TemporaryDirectory()))
        recorder = _Recorder(heldout, plan, work, progress)
        floats = recorder.draws(reference, None)
        found = {
            arm.name: _compare_arm(arm, recorder, reference, floats, execute, gripper)
            for arm in arms
        }
    return Comparison(
        reference=Reference(
            name=reference.name, kind=reference.kind, sha256=reference.sha256,
            smoothness=_smoothness(floats, heldout, execute),
        ),
        arms=found, frames=len(heldout), noises=plan.noises, set=heldout.card.name,
        set_sha256=heldout.checksum, seed=plan.seed, execute=execute, dimensions=names,
        versions={"quantvla": quantvla.__version__, "numpy": np.__version__},
    )  # fmt: skip


class _Recorder:
    """Samples arms on one set with one plan."""

    def __init__(
        self, heldout: CalibrationSet, plan: ComparisonPlan, work: Path, progress: Progress
    ) -> None:
        self.heldout, self.plan = heldout, plan
        self._work, self._progress = work, progress
        self._frames = [frame.observation for frame in heldout]

    def draws(self, arm: Arm, reference: Arm | None) -> list[Draws]:
        """Return what ``arm`` does on every frame, sampled now where it was not before."""
        plan = self.plan
        target = self._directory(arm, reference)
        against = None if reference is None else self._directory(reference, None)
        threads = max(1, physical_cores() // plan.processes)
        tasks = [
            Task(
                arm=arm, index=index, frame=frame, seed=plan.seed, noises=plan.noises,
                output=target / f"{index:05d}.npz",
                reference=None if against is None else against / f"{index:05d}.npz",
                threads=threads,
            )
            for index, frame in enumerate(self._frames)
        ]  # fmt: skip
        record(
            tasks,
            processes=plan.processes,
            what=f"sampling {arm.name}",
            progress=self._progress,
        )
        return [read_draws(task.output) for task in tasks]

    def _directory(self, arm: Arm, reference: Arm | None) -> Path:
        against = None if reference is None else reference.sha256
        parts = (self.heldout.checksum, self.plan.seed, self.plan.noises, against)
        return recording_directory(self._work, arm, *parts)


def _compare_arm(
    arm: Arm,
    recorder: _Recorder,
    reference: Arm,
    floats: Sequence[Draws],
    execute: int,
    gripper: Gripper | None,
) -> ArmComparison:
    ours = recorder.draws(arm, reference)
    chunks, expected = _chunks(ours), _chunks(floats)
    target = np.stack([draws.velocities for draws in floats])
    return ArmComparison(
        kind=arm.kind,
        sha256=arm.sha256,
        error=action_error(_flat(chunks), _flat(expected), execute=execute, gripper=gripper),
        velocity_teacher_forced=velocity_error(np.stack([d.forced for d in ours]), target),
        velocity_free_running=velocity_error(np.stack([d.velocities for d in ours]), target),
        distribution=distribution_error(
            np.stack([draws.own for draws in floats]),
            expected,
            chunks,
            permutations=recorder.plan.permutations,
            seed=recorder.plan.seed,
        ),
        smoothness=_smoothness(ours, recorder.heldout, execute),
    )


def _chunks(draws: Sequence[Draws]) -> Array:
    """Return (frames, noises, horizon, dim)."""
    return np.stack([frame.chunks for frame in draws])


def _flat(chunks: Array) -> Array:
    return chunks.reshape(-1, *chunks.shape[2:])


def _smoothness(draws: Sequence[Draws], heldout: CalibrationSet, execute: int) -> Smoothness:
    """Return the smoothness over all noises; frames have their own noises, as chunks have on a robot."""
    chunks = _chunks(draws)
    episodes = [entry.episode for entry in heldout.entries]
    frames = [entry.frame for entry in heldout.entries]
    return pool(
        [
            chunk_smoothness(chunks[:, index], episodes, frames, execute=execute)
            for index in range(chunks.shape[1])
        ]
    )


def _dimension_names(heldout: CalibrationSet, description: Described) -> tuple[str, ...]:
    action = heldout.robot.action
    if description.action.names:
        return description.action.names
    if action is not None and len(action.names) == description.action.dim:
        return action.names
    return tuple(str(index) for index in range(description.action.dim))


def _check_arms(reference: Arm, arms: Sequence[Arm]) -> None:
    names = [reference.name, *(arm.name for arm in arms)]
    for name in names:
        if names.count(name) > 1:
            raise explain(
                "arms",
                "name used twice",
                got=repr(name),
                remedy="name them, as NAME=DIRECTORY",
            )
    if not arms:
        raise explain(
            "arms",
            f"nothing to compare {reference.name!r} with",
            remedy="give two directories, or one and --policy.path",
        )
    expected = reference.contract
    for arm in arms:
        for field, what in _SHARED_CONTRACT.items():
            ours, theirs = getattr(arm.contract, field), getattr(expected, field)
            if _comparable(ours) != _comparable(theirs):
                raise explain(
                    f"{arm.name} ({arm.path})",
                    f"is of another robot than {reference.name}: expected {what} {theirs}",
                    got=ours,
                    remedy="compare policies of one robot with the same chunks",
                )


_SHARED_CONTRACT = {
    "cameras": "cameras",
    "state_key": "state",
    "state_dim": "state length",
    "action_dim": "action dimension",
    "horizon": "chunk length",
    "noise_shape": "noise of shape",
}


def _comparable(value: object) -> object:
    """Return the value for a comparison: the order of cameras does not matter, that of a shape does."""
    is_names = isinstance(value, tuple) and value and isinstance(value[0], str)
    return frozenset(value) if is_names and isinstance(value, tuple) else value
