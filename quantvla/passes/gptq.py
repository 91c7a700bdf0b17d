"""Weights to integers by second-order rounding on the inputs that the integer model really sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil
from typing import Annotated, ClassVar, Literal

import msgspec

from quantvla.passes.base import Kind, PassReport, SiteError, Subject
from quantvla.passes.round_weights import weight_error
from quantvla.plan import PlanEntry
from quantvla.progress import Progress
from quantvla.quantizer import quantize_weight
from quantvla.runtime.errors import explain
from quantvla.second_order import (
    SecondOrder,
    corrected_target,
    relative_error,
    round_second_order,
)
from quantvla.statistics import InputMoments

WHAT = "rounding weights"


class Gptq(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="gptq"):
    """GPTQ site by site in the order of a run, each on the inputs that the finished ones before it produce.

    ``target``: ``teacher`` also makes up for the drift of the inputs since the float model (see
    `corrected_target`), ``weight`` rounds the weight as it is. ``tokens``: ``attended`` lets a
    context token count as much as the action head attends to it (the idea of RSQ, arXiv 2503.01820):
    the one state token matters more than a hundred image patches. ``dynamic``, ``polish``: see
    `SecondOrder`. ``step``: linears whose inputs are
    taken in one run over the calibration set; with ``layer`` and ``stage``, which are cheaper, what
    comes before a linear in the same layer or stage is still float when its input is taken. ``too_few``: what happens to a site whose input
    has more channels than the calibration set gives rows.
    """

    phase: ClassVar[Kind] = "rounding"
    damp: Annotated[float, msgspec.Meta(gt=0)] = 0.01
    target: Literal["weight", "teacher"] = "teacher"
    tokens: Literal["attended", "equal"] = "attended"
    target_damp: Annotated[float, msgspec.Meta(gt=0)] = 0.01
    dynamic: bool = True
    polish: Annotated[int, msgspec.Meta(ge=0)] = 0
    step: Literal["input", "layer", "stage"] = "input"
    too_few: Literal["refuse", "round"] = "refuse"

    def __call__(self, subject: Subject, progress: Progress) -> PassReport:
        """Fill ``subject.weights`` for all quantized sites of the plan; float weights stay as they are."""
        errors: dict[str, SiteError] = {}
        notes: list[str] = []
        for group in self._groups(subject):
            representatives = list(group)
            members = [site for sites in group.values() for site in sites]
            moments = subject.observer.moments(
                representatives,
                unfinished=members,
                attended=self.tokens == "attended",
                what=f"{WHAT}, {representatives[0]}",
            )
            for representative, sites in group.items():
                for site in sites:
                    error, note = self._round(
                        subject, subject.planned[site], moments[representative]
                    )
                    errors[site] = error
                    notes += note
        progress(WHAT, 1, 1)
        ordered = tuple(errors[entry.site] for entry in subject.plan.quantized)
        return PassReport(kind="gptq", sites=ordered, notes=tuple(notes))

    def _groups(self, subject: Subject) -> Iterator[dict[str, list[str]]]:
        """Yield what is rounded after one run over the set: input by input, a representative and its readers."""
        order = subject.observer.forward_order(list(subject.planned))
        inputs: dict[tuple[str, ...], list[str]] = {}
        for site in order:
            inputs.setdefault(subject.siblings[site], []).append(site)
        layers: dict[object, dict[str, list[str]]] = {}
        for sites in inputs.values():
            entry = subject.planned[sites[0]]
            keys = {
                "input": sites[0],
                "layer": (entry.stage, entry.part, entry.layer),
                "stage": entry.stage,
            }
            key = keys[self.step]
            layers.setdefault(key, {})[sites[0]] = sites
        yield from layers.values()

    def _round(
        self, subject: Subject, entry: PlanEntry, moments: InputMoments
    ) -> tuple[SiteError, Sequence[str]]:
        weight = subject.floats.get(f"{entry.site}.weight")
        notes = []
        if moments.tokens < entry.in_features:
            notes = [self._too_few(entry, moments.tokens, subject.observer.frames)]
        if entry.site not in subject.weights:
            scheme = entry.scheme
            if notes:
                rounded = quantize_weight(
                    weight, scheme.weight_bits, scheme.block,
                    moments.student.diagonal() / moments.tokens, scheme.inputs,
                )  # fmt: skip
            else:
                target = weight
                if self.target == "teacher":
                    target = corrected_target(
                        weight, moments.student, moments.cross, self.target_damp
                    )
                options = SecondOrder(self.damp, self.dynamic, self.polish)
                rounded = round_second_order(target, moments.student, scheme, options)
            subject.weights.put(entry.site, rounded)
        kept = subject.weights.get(entry.site)
        return SiteError(
            site=entry.site,
            rows=moments.tokens,
            relative_weight_error=weight_error(weight, kept),
            relative_output_error=relative_error(weight, kept, moments.student),
        ), notes

    def _too_few(self, entry: PlanEntry, rows: int, frames: int) -> str:
        needed = ceil(entry.in_features * frames / max(rows, 1))
        if self.too_few == "refuse":
            raise explain(
                entry.site,
                f"gptq needs at least {entry.in_features} calibration rows for as many input channels",
                got=f"{rows} from {frames} frames",
                remedy=f'calibrate with at least {needed} frames, or set too_few = "round" in the recipe',
            )
        return (
            f"warning: {entry.site}: {rows} calibration rows for {entry.in_features} input channels, "
            "so it was rounded without second-order compensation"
        )
