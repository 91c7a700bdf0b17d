"""What passes see of a policy on the calibration set: inputs, outputs and attention of teacher and student."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantvla.calib_sets import CalibrationSet
from quantvla.calibrate import collect_statistics
from quantvla.distillation import VelocityMatching
from quantvla.families.base import LoadedPolicy, Stage
from quantvla.float_weights import FloatWeights
from quantvla.lockstep import Lockstep
from quantvla.passes.base import Matching, WeightStore
from quantvla.plan import Plan
from quantvla.progress import Progress
from quantvla.quantizer import represented_input
from quantvla.staged import Tensors, run_stage
from quantvla.statistics import InputMoments, LogitSums, OutputSums, SiteStatistics, not_finite


class _ReachedError(Exception):
    """Raised by a hook to leave a run that has shown what it should."""


class CalibrationObserver:
    """What passes see of the policy (`quantvla.passes.base.Observer`)."""

    def __init__(
        self, loaded: LoadedPolicy, plan: Plan, calibration: CalibrationSet, floats: FloatWeights,
        weights: WeightStore, *, seed: int, work: Path, progress: Progress,
    ) -> None:  # fmt: skip
        self._loaded, self._calibration = loaded, calibration
        self._seed, self._work, self._progress = seed, work, progress
        self._planned = {entry.site: entry for entry in plan.quantized}
        self._stage_of = {site.name: site.stage for site in loaded.sites}
        self._runs = Lockstep(
            loaded, list(self._planned), calibration, floats, weights,
            seed=seed, folder=work / "frames", progress=progress,
        )  # fmt: skip
        self._statistics: dict[str, SiteStatistics] | None = None
        self._folded = 0
        self.frames = len(calibration)

    def floats_changed(self) -> None:
        """Forget what was seen: the float weights are other ones now."""
        self._runs.forget_()
        self._statistics = None
        self._folded += 1

    def corrected(self) -> None:
        """Forget what the student showed: a correction changed it."""
        self._runs.corrected_()

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
        stage = self._stage_of[sites[0]]
        weighted = attended and self._loaded.stage(stage).attended
        found = {s: InputMoments.empty(self._planned[s].in_features) for s in sites}
        for call in self._runs.calls(stage, what):
            with self._runs.teacher():
                teacher = self._inputs(sites, stage, call.teacher)
            with self._runs.student(leave_float=unfinished):
                student = self._inputs(sites, stage, call.student)
            for site in sites:
                scheme = self._planned[site].scheme
                x = represented_input(student[site], scheme.block, scheme.inputs)
                if not bool(torch.isfinite(x).all()):
                    raise not_finite(site, call.frame)
                counts = self._runs.attention(call.frame, len(x)) if weighted else None
                found[site].add_(x, teacher[site], counts)
        return found

    def first_call(self, sites: Sequence[str]) -> Mapping[str, Tensor]:
        """Return the inputs (tokens, in) of these sites in the first call of the first frame."""
        found: dict[str, Tensor] = {}
        for stage in self._stages_of(sites):
            own = [site for site in sites if self._stage_of[site] == stage]
            with self._runs.teacher():
                found |= self._inputs(own, stage, self._runs.first_call(stage))
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
            for call in self._runs.calls(stage, what, frames):
                with self._runs.teacher(), self._loaded.tap_attention(partial(see, False)):
                    run_stage(self._loaded.stage(stage), call.teacher)
                with self._runs.student(), self._loaded.tap_attention(partial(see, True)):
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
            for call in self._runs.calls(stage, what, frames):
                with self._runs.teacher():
                    teacher = self._seen_outputs(own, stage, call.teacher)
                with self._runs.student():
                    student = self._seen_outputs(own, stage, call.student)
                for site in own:
                    found[site].add_(teacher[site], student[site])
        return found

    def matching(self, what: str) -> Matching:
        """Return the comparison of a student's velocities with the teacher's."""
        return VelocityMatching(self._loaded, self._runs, self._seed, what)

    def forward_order(self, sites: Sequence[str]) -> Sequence[str]:
        """Return the sites in the order in which a run reaches them."""
        order: list[str] = []
        for stage in self._stages_of(sites):
            own = [site for site in sites if self._stage_of[site] == stage]
            known = self._runs.first_call(stage)
            with _inputs_to(self._loaded.policy, own, lambda site, _x: order.append(site)):
                run_stage(self._loaded.stage(stage), known)
        return list(dict.fromkeys(order))

    def _stages_of(self, sites: Sequence[str]) -> list[str]:
        wanted = {self._stage_of[site] for site in sites}
        return [stage.name for stage in self._loaded.stages if stage.name in wanted]

    def _inputs(self, sites: Sequence[str], stage: str, known: Tensors) -> dict[str, Tensor]:
        """Return the inputs (tokens, in) of linears in one call, and leave the call when all were seen."""
        seen: dict[str, Tensor] = {}

        def see(site: str, x: Tensor) -> None:
            seen.setdefault(site, x.reshape(-1, x.shape[-1]))
            if len(seen) == len(sites):
                raise _ReachedError

        with _inputs_to(self._loaded.policy, sites, see):
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


def _run_until_reached(stage: Stage, known: Tensors) -> None:
    try:
        run_stage(stage, known)
    except _ReachedError:
        return


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
