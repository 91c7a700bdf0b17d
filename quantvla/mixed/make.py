"""`quantvla plan --budget-mb/--budget-ms`: measure what is missing, solve, and say how good the model is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import msgspec

from quantvla.families.base import LoadedPolicy
from quantvla.latency_table import Kernel, LatencyTable
from quantvla.mixed.choose import (
    FRONTIER_POINTS,
    Costs,
    MixedPlan,
    Point,
    Problem,
    SiteChoice,
    best,
    frontier,
    kernels,
    latencies,
    uniform_choices,
    weight_bytes,
)
from quantvla.mixed.offers import Format, format_name, left_out, offers
from quantvla.mixed.sensitivity import Choice, Sensitivity, Subject
from quantvla.plan import Plan, PlanEntry
from quantvla.progress import Progress
from quantvla.runtime.errors import explain
from quantvla.schemes import Scheme

Profiler = Callable[[Sequence[Kernel]], LatencyTable]
Offered = tuple[tuple[PlanEntry, tuple[Scheme, ...]], ...]


@dataclass(frozen=True)
class Request:
    """What is asked for: the base recipe's plan, the formats on offer, the budgets, where to keep results.

    ``profile`` returns a latency table with the given kernels in it; None leaves time out.
    """

    base: Plan
    formats: tuple[Format, ...]
    budget_mib: float | None
    budget_ms: float | None
    cache: Path
    profile: Profiler | None


@dataclass(frozen=True)
class Result:
    """The plan, and the scheme of every site on offer."""

    plan: MixedPlan
    choice: Choice


def make_mixed_plan(subject: Subject, request: Request, progress: Progress) -> Result:
    """Return the best choice within the budgets.

    The sites on offer are those that the base recipe makes integer. Raises `QuantVLAError` with the
    smallest feasible budget, before action errors are measured.
    """
    if not request.base.quantized:
        raise explain(
            f"recipe {request.base.recipe!r}", "makes no site integer", remedy="use another recipe"
        )
    offered = tuple((entry, offers(entry, request.formats)) for entry in request.base.quantized)
    byte_costs = {
        (entry.site, format_name(scheme)): weight_bytes(entry, scheme)
        for entry, schemes in offered
        for scheme in (*schemes, entry.scheme)
    }
    machine, latency = None, None
    if request.profile is not None:
        table, latency = _latency(subject.loaded, offered, request.profile)
        machine = table.machine.describe()
    problem = Problem(offered, Costs(byte_costs, latency), request.budget_mib, request.budget_ms)
    problem.check()
    sensitivity = Sensitivity(subject, request.cache, progress)
    # the base recipe's own formats are measured too, to compare with
    errors = sensitivity.errors([(entry, _with_base(entry, s)) for entry, s in offered])
    return _solved(problem, errors, sensitivity, request, subject, machine)


def _with_base(entry: PlanEntry, schemes: tuple[Scheme, ...]) -> tuple[Scheme, ...]:
    return tuple(dict.fromkeys((*schemes, entry.scheme)))


def _latency(
    loaded: LoadedPolicy, offered: Offered, profile: Profiler
) -> tuple[LatencyTable, dict[tuple[str, str], float]]:
    """Return the latency table, and milliseconds a chunk of every site and format."""
    with_base = [(entry, _with_base(entry, schemes)) for entry, schemes in offered]
    kernel_of = kernels(loaded, with_base)
    table = profile(list(kernel_of.values()))
    stage_of = {entry.site: entry.stage for entry, _ in offered}
    return table, latencies(loaded, kernel_of, table.lookup(), stage_of)


def _solved(
    problem: Problem,
    errors: Mapping[tuple[str, str], float],
    sensitivity: Sensitivity,
    request: Request,
    subject: Subject,
    machine: str | None,
) -> Result:
    def checked(name: str, choice: Choice) -> Point:
        point = problem.point(name, choice, errors)
        return msgspec.structs.replace(point, measured_nrmse=sqrt(sensitivity.together(choice)))

    chosen = best(problem, errors)
    points = tuple(
        problem.point(f"{limit:.4g}", choice, errors) for limit, choice in frontier(problem, errors)
    )
    notes = left_out(request.base.quantized, request.formats)
    if len(points) < FRONTIER_POINTS:
        notes += (
            f"the frontier shows {len(points)} of {FRONTIER_POINTS} budgets: "
            "with the others no choice keeps the second budget",
        )
    base: Choice = {entry.site: (entry, entry.scheme) for entry, _ in problem.offered}
    plan = MixedPlan(
        base_recipe=request.base.recipe,
        budget_mib=request.budget_mib,
        budget_ms=request.budget_ms,
        chosen=checked("chosen", chosen),
        base=checked(request.base.recipe, base),
        uniform=tuple(checked(n, choice) for n, choice in uniform_choices(problem).items()),
        frontier=points,
        sites=tuple(_site(problem, entry, scheme, errors) for entry, scheme in chosen.values()),
        probe_frames=len(subject.probes),
        calibration=subject.calibration.card.name,
        machine=machine,
        notes=notes,
    )
    return Result(plan, chosen)


def _site(
    problem: Problem, entry: PlanEntry, scheme: Scheme, errors: Mapping[tuple[str, str], float]
) -> SiteChoice:
    key = (entry.site, format_name(scheme))
    latency = problem.costs.latency_ms
    return SiteChoice(
        site=entry.site, stage=entry.stage, part=entry.part, kind=entry.kind, layer=entry.layer,
        out_features=entry.out_features, in_features=entry.in_features, format=key[1],
        bytes=problem.costs.bytes[key], latency_ms=None if latency is None else latency[key],
        nrmse=sqrt(errors[key]),
    )  # fmt: skip
