"""Block scales of the integer weights trained together, so that the whole policy's velocities come back."""

from __future__ import annotations

from collections.abc import Mapping
from math import cos, pi
from pathlib import Path
from typing import Annotated, ClassVar

import msgspec
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from quantvla.passes.base import Kind, Matching, PassReport, Subject
from quantvla.progress import Progress
from quantvla.quantized_linear import TunableLinear
from quantvla.runtime.errors import explain
from quantvla.runtime.files import write_atomic

WHAT = "tuning scales"
SAVE_EVERY_STEPS = 25
PROBES = 16
"""Draws on which the error before and after is reported; training never sees them."""


_MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam keeps of a parameter."""


class TuneScales(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="tune_scales"
):
    """Adam on the block scales of all integer linears at once; codes, formats and bytes stay what they are.

    The loss is the relative squared error of the velocities, all denoise steps, student on the teacher's
    states, one frame and a fresh noise a draw (`quantvla.distillation`). Rounding weights layer by layer
    minimizes each layer's own error; this one minimizes what reaches the action. Rounding of activations
    passes gradients straight through (Bengio et al., arXiv 1308.3432). ``steps`` of ``batch`` draws;
    ``rate``: the largest relative change of a scale in the first step, falling to zero as a half cosine.
    """

    phase: ClassVar[Kind] = "correction"
    steps: Annotated[int, msgspec.Meta(ge=1)] = 400
    rate: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 1e-3
    batch: Annotated[int, msgspec.Meta(ge=1)] = 8

    def __call__(self, subject: Subject, progress: Progress) -> PassReport:
        """Train the scales of every planned linear and keep them in half precision."""
        linears = {
            site: TunableLinear(subject.weights.get(site), subject.linear(site).bias)
            for site in subject.planned
        }
        matching = subject.observer.matching(WHAT)
        before = _probe(matching, linears)
        training = _Training(linears, subject.scratch / "tune_scales.safetensors")
        for step in range(training.done, self.steps):
            progress(WHAT, step, self.steps)
            for index in range(self.batch):
                loss = matching.loss(linears, PROBES + step * self.batch + index) / self.batch
                _require_finite(loss, step)
                loss.backward()  # type: ignore[no-untyped-call]
            training.step_(self.rate * (1 + cos(pi * step / self.steps)) / 2)
        progress(WHAT, self.steps, self.steps)
        after = _probe(matching, linears)
        for site, linear in linears.items():
            subject.weights.put(site, linear.tuned())
        return PassReport(
            kind="tune_scales",
            notes=(
                f"{len(linears)} linears, {self.steps * self.batch} draws; relative RMS error of the "
                f"velocities on {PROBES} draws not trained on: {before:.3%} -> {after:.3%}",
            ),
        )


class _Training:
    """Adam over the ratios of all linears, written to ``file`` every few steps and read from there."""

    def __init__(self, linears: Mapping[str, TunableLinear], file: Path) -> None:
        self._ratios = {site: linear.ratio for site, linear in linears.items()}
        self._optimizer = torch.optim.Adam(self._ratios.values())
        self._file = file
        self.done = 0
        if file.is_file():
            self._read_()

    def step_(self, rate: float) -> None:
        """Take one step with the gradients there are."""
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.done += 1
        if self.done % SAVE_EVERY_STEPS == 0:
            self._write()

    def _write(self) -> None:
        tensors = {"done": torch.tensor(self.done)}
        for site, ratio in self._ratios.items():
            state = self._optimizer.state[ratio]
            tensors[f"{site}.ratio"] = ratio.detach()
            tensors |= {f"{site}.{name}": state[name] for name in _MOMENTS}
        write_atomic(self._file, save(tensors))

    def _read_(self) -> None:
        tensors = load_file(self._file)
        self.done = int(tensors["done"])
        for site, ratio in self._ratios.items():
            ratio.data.copy_(tensors[f"{site}.ratio"])
            state = {name: tensors[f"{site}.{name}"] for name in _MOMENTS}
            self._optimizer.state[ratio] = {"step": torch.tensor(float(self.done)), **state}


def _probe(matching: Matching, linears: Mapping[str, TunableLinear]) -> float:
    """Return the relative RMS error over draws that training does not see."""
    with torch.no_grad():
        losses = [float(matching.loss(linears, draw)) for draw in range(PROBES)]
    return float((sum(losses) / PROBES) ** 0.5)


def _require_finite(loss: Tensor, step: int) -> None:
    if not bool(torch.isfinite(loss)):
        raise explain(
            "tune_scales",
            "the error of the velocities is not finite",
            got=f"{float(loss.detach())} in step {step}",
            remedy="lower `rate` in the recipe",
        )
