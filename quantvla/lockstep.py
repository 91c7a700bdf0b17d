"""Teacher and student side by side on the calibration set: the float policy, and it with finished integers.

Both see the same observations and noise; the student denoises from the teacher's states, so that
what differs is what the integers do and not where the trajectory went.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quantvla import tensor_file
from quantvla.calib_sets import CalibrationSet
from quantvla.calibrate import frame_noise
from quantvla.families.base import LoadedPolicy, replaced
from quantvla.float_weights import FloatWeights
from quantvla.passes.base import WeightStore
from quantvla.progress import Progress
from quantvla.quantized_linear import SimulatedLinear
from quantvla.runtime.preprocess import Preprocessor
from quantvla.staged import (
    Tensors,
    make_preprocessor,
    prepare,
    run_context,
    run_stage,
    sample,
    stacked,
    without_padding,
)

KEPT_BYTES = 2 << 30
"""Float weights of finished integers in memory; those beyond are made again in every call."""
STATES = "sampler.states"
"""Name of the teacher's denoising states among what it knows of a frame, in files."""
LEAST_ATTENTION = 0.05
"""A token counts at least this share of the mean, so that moments keep their rank."""


@dataclass
class _Frame:
    """One calibration frame: everything the teacher knows by name, its denoising states, and what the student knows.

    ``attention``: how much attention the leading keys get in the sampler's stage, mean 1.
    """

    teacher: Tensors
    states: list[NDArray[np.float32]]
    attention: Tensor | None = None
    student: Tensors = field(default_factory=dict)
    finished: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """One call of a stage on one frame, for teacher and student."""

    frame: int
    teacher: Tensors
    student: Tensors


class Lockstep:
    """Runs teacher and student over the calibration set, stage by stage.

    What a frame keeps, its inputs and the context of teacher and student, are pages of files in ``folder``: keys and
    values of a large language model are tens of megabytes a frame. A run that continues finds the teacher's there.
    """

    def __init__(
        self, loaded: LoadedPolicy, sites: Sequence[str], calibration: CalibrationSet,
        floats: FloatWeights, weights: WeightStore, *, seed: int, folder: Path, progress: Progress,
    ) -> None:  # fmt: skip
        self._loaded, self._sites, self._calibration = loaded, sites, calibration
        self._root, self._state = folder, 0
        self._floats, self._weights, self._seed, self._progress = floats, weights, seed, progress
        self._stage_of = {site.name: site.stage for site in loaded.sites}
        self._frames: list[_Frame] = []
        self._simulated: dict[str, SimulatedLinear] = {}
        self._kept_bytes = 0
        self._corrected = 0

    def forget_(self) -> None:
        """Start over: the float weights are other ones now."""
        self._frames = []
        shutil.rmtree(self._folder, ignore_errors=True)
        self._state += 1

    def corrected_(self) -> None:
        """Forget what the student showed: a correction changed it."""
        self._simulated, self._kept_bytes = {}, 0
        self._corrected += 1

    def calls(self, stage: str, what: str, first: int | None = None) -> Iterator[Call]:
        """Yield every call of a stage over the set; the student's is on the teacher's denoising states."""
        frames = self._ready_frames(what)[:first]
        for index, frame in enumerate(frames):
            self._progress(what, index, len(frames))
            self._finish_student(index, frame, before=stage)
            pairs = zip(
                self._sampled(stage, frame.teacher, frame),
                self._sampled(stage, {**frame.teacher, **frame.student}, frame),
                strict=True,
            )
            for teacher, student in pairs:
                yield Call(index, teacher, student)
        self._progress(what, len(frames), len(frames))

    def contexts(self, what: str) -> list[Tensors]:
        """Return what the teacher knows before sampling, frame by frame."""
        return [frame.teacher for frame in self._ready_frames(what)]

    def first_call(self, stage: str) -> Tensors:
        """Return the teacher's inputs of a stage in the first call on the first frame."""
        frame = self._ready_frames("teacher")[0]
        return next(self._sampled(stage, frame.teacher, replace(frame, states=frame.states[:1])))

    def _sampled(self, stage: str, known: Tensors, frame: _Frame) -> Iterator[Tensors]:
        """Yield the inputs of every call of a stage: one, or one a denoising step, stacked where it can be."""
        sampler = self._loaded.interface.sampler
        if stage != sampler.stage:
            yield known
            return
        calls = [
            {**known, sampler.state: x, sampler.time: np.array([time], np.float32)}
            for x, time in zip(frame.states, sampler.timesteps, strict=False)
        ]
        yield from stacked(self._loaded.stage(stage), calls)

    def _ready_frames(self, what: str) -> list[_Frame]:
        """Return all frames with the teacher's context and states, computed once per state of the weights."""
        if not self._frames:
            preprocess = make_preprocessor(self._loaded.interface)
            frames = []
            with self.teacher():
                for index in range(len(self._calibration)):
                    self._progress(f"{what}: teacher", index, len(self._calibration))
                    path = self._folder / f"{index}.teacher.safetensors"
                    if path.is_file():
                        known = tensor_file.read_arrays(path)
                    else:
                        known = tensor_file.mapped(path, self._teach(preprocess, index))
                    frames.append(_Frame(known, list(known.pop(STATES))))
            self._frames = frames
        return self._frames

    def _teach(self, preprocess: Preprocessor, index: int) -> Tensors:
        """Return what the teacher knows of a frame before sampling, and its denoising states."""
        sampler, states = self._loaded.interface.sampler, list[NDArray[np.float32]]()
        observation = self._calibration[index].observation
        tensors = without_padding(self._loaded, prepare(preprocess, observation))
        known = run_context(self._loaded, tensors)
        noise = frame_noise(self._seed, index, sampler.noise_shape)
        sample(self._loaded, known, noise, partial(_keep_state, states))
        return {**known, STATES: np.stack(states)}

    @property
    def _folder(self) -> Path:
        return self._root / str(self._state)

    def attention(self, index: int, tokens: int) -> Tensor:
        """Return how much attention each of the leading ``tokens`` keys gets, mean 1, at least a twentieth."""
        frame, stage = self._frames[index], self._loaded.interface.sampler.stage
        if frame.attention is None:
            totals: list[Tensor] = []

            def see(_query: str, q: Tensor, k: Tensor, mask: Tensor) -> None:
                logits = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
                hidden = ~mask[:, None]
                totals.append(logits.masked_fill(hidden, -torch.inf).softmax(-1).sum((0, 1, 2)))

            with self.teacher(), self._loaded.tap_attention(see):
                for known in self._sampled(stage, frame.teacher, frame):
                    run_stage(self._loaded.stage(stage), known)
            frame.attention = torch.stack([total[:tokens] for total in totals]).sum(0)
        share = frame.attention / frame.attention.mean()
        return share.clamp_min(LEAST_ATTENTION)

    def _finish_student(self, index: int, frame: _Frame, *, before: str) -> None:
        """Bring the student's context up to ``before``; a stage is run again when its integers are others."""
        rounded = self._corrected
        for stage in self._loaded.stages:
            if stage.name == before:
                return
            rounded += sum(
                site in self._weights for site in self._sites if self._stage_of[site] == stage.name
            )
            if rounded and frame.finished.get(stage.name) != rounded:
                with self.student():
                    found = run_stage(stage, {**frame.teacher, **frame.student})
                frame.student |= tensor_file.mapped(
                    self._folder / f"{index}.student-{stage.name}.safetensors", found
                )
                frame.finished[stage.name] = rounded

    def teacher(self) -> AbstractContextManager[None]:
        """Have the float policy in place, without corrections, while the block runs."""
        return self._floats.teacher()

    @contextmanager
    def student(self, leave_float: Sequence[str] = ()) -> Iterator[None]:
        """Have the finished integers in place, but for ``leave_float``, while the block runs."""
        finished = [s for s in self._sites if s in self._weights and s not in leave_float]
        for site in finished:
            if site not in self._simulated:
                self._simulated[site] = self._simulate(site)
        modules: dict[str, nn.Module] = {site: self._simulated[site] for site in finished}
        with replaced(self._loaded.policy, modules):
            yield

    def _simulate(self, site: str) -> SimulatedLinear:
        bias: Any = self._loaded.policy.get_submodule(site).bias
        weight = self._weights.get(site)
        size = weight.codes.numel() * torch.float32.itemsize
        kept = self._kept_bytes + size <= KEPT_BYTES
        self._kept_bytes += size if kept else 0
        return SimulatedLinear(weight, bias, kept=kept)


def _keep_state(states: list[NDArray[np.float32]], x: NDArray[np.float32], _v: object) -> None:
    states.append(x.copy())
