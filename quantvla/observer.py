"""Teacher and student on the calibration set: the float policy, and the same with finished integers in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quantvla.calib_sets import CalibrationSet
from quantvla.calibrate import collect_statistics, frame_noise
from quantvla.families.base import LoadedPolicy, Stage, replaced
from quantvla.float_weights import FloatWeights
from quantvla.passes.base import WeightStore
from quantvla.plan import Plan
from quantvla.progress import Progress
from quantvla.quantized_linear import SimulatedLinear
from quantvla.quantizer import represented_input
from quantvla.staged import (
    Tensors,
    make_preprocessor,
    prepare,
    run_context,
    run_stage,
    sample,
    without_padding,
)
from quantvla.statistics import InputMoments, LogitSums, OutputSums, SiteStatistics, not_finite

LEAST_ATTENTION = (
    0.05  # a token counts at least this share of the mean, so that moments keep their rank
)


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
class _Call:
    """One call of a stage on one frame, for teacher and student."""

    frame: int
    teacher: Tensors
    student: Tensors


class _ReachedError(Exception):
    """Raised by a hook to leave a run that has shown what it should."""


class CalibrationObserver:
    """What passes see of the policy (`quantvla.passes.base.Observer`).

    Memory: one frame keeps its inputs, the context of teacher and student, and the states of the sampler.
    """

    def __init__(
        self, loaded: LoadedPolicy, plan: Plan, calibration: CalibrationSet, floats: FloatWeights,
        weights: WeightStore, *, seed: int, work: Path, progress: Progress,
    ) -> None:  # fmt: skip
        self._loaded, self._calibration, self._floats, self._weights = (
            loaded,
            calibration,
            floats,
            weights,
        )
        self._seed, self._work, self._progress = seed, work, progress
        self._planned = {entry.site: entry for entry in plan.quantized}
        self._stage_of = {site.name: site.stage for site in loaded.sites}
        self._frames: list[_Frame] = []
        self._statistics: dict[str, SiteStatistics] | None = None
        self._simulated: dict[str, SimulatedLinear] = {}
        self._folded = self._corrected = 0
        self.frames = len(calibration)

    # ------------------------------------------------------------------------------- what changed
    def floats_changed(self) -> None:
        """Forget what was seen: the float weights are other ones now."""
        self._frames, self._statistics = [], None
        self._folded += 1

    def corrected(self) -> None:
        """Forget what the student showed: a correction changed it."""
        self._simulated = {}
        self._corrected += 1

    # ------------------------------------------------------------------------------------- passes
    def statistics(self) -> Mapping[str, SiteStatistics]:
        """Return what every planned site's float input looks like; kept on disk once per state of the weights."""
        if self._statistics is None:
            self._statistics = collect_statistics(
                self._loaded, list(self._planned), self._calibration, seed=self._seed,
                journal=self._work / f"statistics-{self._folded}", progress=self._progress,
            )  # fmt: skip
        return self._statistics

    def moments(
        self, sites: Sequence[str], *, unfinished: Sequence[str], attended: bool, what: str
    ) -> Mapping[str, InputMoments]:
        """Return the moments of these sites' inputs, all of one stage, with ``unfinished`` ones float."""
        linears = {site: self._loaded.policy.get_submodule(site) for site in sites}
        weighted = attended and self._loaded.stage(self._stage_of[sites[0]]).attended
        found = {s: InputMoments.empty(self._planned[s].in_features) for s in sites}
        for call in self._calls(self._stage_of[sites[0]], what):
            with self._teacher():
                teacher = self._inputs(linears, self._stage_of[sites[0]], call.teacher)
            with self._student(leave_float=unfinished):
                student = self._inputs(linears, self._stage_of[sites[0]], call.student)
            for site in sites:
                scheme = self._planned[site].scheme
                x = represented_input(student[site], scheme.block, scheme.inputs)
                if not bool(torch.isfinite(x).all()):
                    raise not_finite(site, call.frame)
                found[site].add_(
                    x, teacher[site], self._attention(call.frame, len(x)) if weighted else None
                )
        return found

    def first_call(self, sites: Sequence[str]) -> Mapping[str, Tensor]:
        """Return the inputs (tokens, in) of these sites in the first call of the first frame."""
        found: dict[str, Tensor] = {}
        for stage in self._stages_of(sites):
            own = [site for site in sites if self._stage_of[site] == stage]
            linears = {site: self._loaded.policy.get_submodule(site) for site in own}
            frame = self._ready_frames("teacher")[0]
            first = replace(frame, states=frame.states[:1])
            with self._teacher():
                found |= self._inputs(
                    linears, stage, next(self._sampled(stage, frame.teacher, first))
                )
        return found

    def logits(
        self, queries: Sequence[str], *, what: str, frames: int | None = None
    ) -> Mapping[str, LogitSums]:
        """Return the spread of attention logits per head, by query projection."""
        found = {query: LogitSums() for query in queries}

        def see(student: bool, query: str, q: Tensor, k: Tensor, mask: Tensor) -> None:
            if query in found:
                sums = found[query].student if student else found[query].teacher
                sums.add_(_visible_logits(q, k, mask))

        for stage in self._stages_of(queries):
            for call in self._calls(stage, what, frames):
                with self._teacher(), self._loaded.tap_attention(partial(see, False)):
                    run_stage(self._loaded.stage(stage), call.teacher)
                with self._student(), self._loaded.tap_attention(partial(see, True)):
                    run_stage(self._loaded.stage(stage), call.student)
        return found

    def outputs(
        self, sites: Sequence[str], *, what: str, frames: int | None = None
    ) -> Mapping[str, OutputSums]:
        """Return the outputs of these linears per channel."""
        width = {site.name: site.out_features for site in self._loaded.sites}
        found = {site: OutputSums.empty(width[site]) for site in sites}
        for stage in self._stages_of(sites):
            own = [site for site in sites if self._stage_of[site] == stage]
            for call in self._calls(stage, what, frames):
                with self._teacher():
                    teacher = self._seen_outputs(own, stage, call.teacher)
                with self._student():
                    student = self._seen_outputs(own, stage, call.student)
                for site in own:
                    found[site].add_(teacher[site], student[site])
        return found

    def forward_order(self, sites: Sequence[str]) -> Sequence[str]:
        """Return the sites in the order in which a run reaches them."""
        order: list[str] = []
        for stage in self._stages_of(sites):
            frame = self._ready_frames("teacher")[0]
            own = [site for site in sites if self._stage_of[site] == stage]
            with _inputs_to(self._loaded.policy, own, lambda site, _x: order.append(site)):
                run_stage(
                    self._loaded.stage(stage), next(self._sampled(stage, frame.teacher, frame))
                )
        return list(dict.fromkeys(order))

    # --------------------------------------------------------------------------------------- runs
    def _stages_of(self, sites: Sequence[str]) -> list[str]:
        wanted = {self._stage_of[site] for site in sites}
        return [stage.name for stage in self._loaded.stages if stage.name in wanted]

    def _calls(self, stage: str, what: str, first: int | None = None) -> Iterator[_Call]:
        """Yield every call of a stage over the set; the student's is on the teacher's denoising states."""
        frames = self._ready_frames(what)[:first]
        for index, frame in enumerate(frames):
            self._progress(what, index, len(frames))
            self._finish_student(frame, before=stage)
            pairs = zip(
                self._sampled(stage, frame.teacher, frame),
                self._sampled(stage, {**frame.teacher, **frame.student}, frame),
                strict=True,
            )
            for teacher, student in pairs:
                yield _Call(index, teacher, student)
        self._progress(what, len(frames), len(frames))

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
        yield from _stacked(self._loaded.stage(stage), calls)

    def _ready_frames(self, what: str) -> list[_Frame]:
        """Return all frames with the teacher's context and states, computed once per state of the weights."""
        if not self._frames:
            preprocess = make_preprocessor(self._loaded.interface)
            shape = self._loaded.interface.sampler.noise_shape
            with self._teacher():
                for index in range(self.frames):
                    self._progress(f"{what}: teacher", index, self.frames)
                    observation = self._calibration[index].observation
                    tensors = without_padding(self._loaded, prepare(preprocess, observation))
                    known = run_context(self._loaded, tensors)
                    states: list[NDArray[np.float32]] = []
                    noise = frame_noise(self._seed, index, shape)
                    sample(self._loaded, known, noise, partial(_keep_state, states))
                    self._frames.append(_Frame(known, states))
        return self._frames

    def _attention(self, index: int, tokens: int) -> Tensor:
        """Return how much attention each of the leading ``tokens`` keys gets, mean 1, at least a twentieth."""
        frame, stage = self._frames[index], self._loaded.interface.sampler.stage
        if frame.attention is None:
            totals: list[Tensor] = []

            def see(_query: str, q: Tensor, k: Tensor, mask: Tensor) -> None:
                logits = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
                hidden = ~mask[:, None]
                totals.append(logits.masked_fill(hidden, -torch.inf).softmax(-1).sum((0, 1, 2)))

            with self._teacher(), self._loaded.tap_attention(see):
                for known in self._sampled(stage, frame.teacher, frame):
                    run_stage(self._loaded.stage(stage), known)
            frame.attention = torch.stack([total[:tokens] for total in totals]).sum(0)
        share = frame.attention / frame.attention.mean()
        return share.clamp_min(LEAST_ATTENTION)

    def _finish_student(self, frame: _Frame, *, before: str) -> None:
        """Bring the student's context up to ``before``; a stage is run again when its integers are others."""
        rounded = self._corrected
        for stage in self._loaded.stages:
            if stage.name == before:
                return
            rounded += sum(
                site in self._weights
                for site in self._planned
                if self._stage_of[site] == stage.name
            )
            if rounded and frame.finished.get(stage.name) != rounded:
                with self._student():
                    frame.student |= run_stage(stage, {**frame.teacher, **frame.student})
                frame.finished[stage.name] = rounded

    @contextmanager
    def _teacher(self) -> Iterator[None]:
        with self._floats.teacher():
            yield

    @contextmanager
    def _student(self, leave_float: Sequence[str] = ()) -> Iterator[None]:
        finished = [s for s in self._planned if s in self._weights and s not in leave_float]
        for site in finished:
            if site not in self._simulated:
                bias: Any = self._loaded.policy.get_submodule(site).bias
                self._simulated[site] = SimulatedLinear(self._weights.get(site), bias)
        modules: dict[str, nn.Module] = {site: self._simulated[site] for site in finished}
        with replaced(self._loaded.policy, modules):
            yield

    def _inputs(
        self, linears: Mapping[str, nn.Module], stage: str, known: Tensors
    ) -> dict[str, Tensor]:
        """Return the inputs (tokens, in) of linears in one call, and leave the call when all were seen."""
        seen: dict[str, Tensor] = {}

        def see(site: str, x: Tensor) -> None:
            seen.setdefault(site, x.reshape(-1, x.shape[-1]))
            if len(seen) == len(linears):
                raise _ReachedError

        with _inputs_to(self._loaded.policy, list(linears), see):
            _run_until_reached(self._loaded.stage(stage), known)
        return seen

    def _seen_outputs(self, sites: Sequence[str], stage: str, known: Tensors) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}

        def see(site: str, _module: nn.Module, _inputs: object, y: Tensor) -> None:
            seen.setdefault(site, y.reshape(-1, y.shape[-1]).clone())

        with ExitStack() as stack:
            for site in sites:
                module = self._loaded.policy.get_submodule(site)
                stack.callback(module.register_forward_hook(partial(see, site)).remove)
            run_stage(self._loaded.stage(stage), known)
        return seen


def _stacked(stage: Stage, calls: list[Tensors]) -> list[Tensors]:
    """Return the calls as one along the stage's batch axes, if it has them."""
    if not stage.batch_axes:
        return calls
    names = [spec.name for spec in stage.inputs]
    return [
        {
            name: np.concatenate([call[name] for call in calls], axis)
            for name, axis in zip(names, stage.batch_axes, strict=True)
        }
    ]


def _run_until_reached(stage: Stage, known: Tensors) -> None:
    try:
        run_stage(stage, known)
    except _ReachedError:
        return


def _keep_state(states: list[NDArray[np.float32]], x: NDArray[np.float32], _v: object) -> None:
    states.append(x.copy())


@contextmanager
def _inputs_to(policy: nn.Module, sites: Sequence[str], see: Any) -> Iterator[None]:
    def hook(site: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        see(site, inputs[0])

    with ExitStack() as stack:
        for site in sites:
            module = policy.get_submodule(site)
            stack.callback(module.register_forward_pre_hook(partial(hook, site)).remove)
        yield


def _visible_logits(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """Return the logits that the mask lets through: (heads, n), batch entries side by side."""
    logits = (q.double() @ k.double().transpose(-1, -2)) / q.shape[-1] ** 0.5
    return torch.cat([own[:, seen] for own, seen in zip(logits, mask, strict=True)], dim=1)
