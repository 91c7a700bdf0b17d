"""From errors and costs to a choice of formats: the knapsack's items, its solution, its frontier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import msgspec
import numpy as np

from quantvla.families.base import LoadedPolicy
from quantvla.latency_table import Kernel
from quantvla.layout import make_plan
from quantvla.mixed.knapsack import Budget, Option, Solution, largest, smallest, solve
from quantvla.mixed.offers import Format, format_name, input_shapes, offers
from quantvla.mixed.sensitivity import Choice
from quantvla.plan import PlanEntry, PlannedSite
from quantvla.quantized_linear import integer_weights
from quantvla.recipe import Default, Recipe
from quantvla.runtime.errors import QuantVLAError
from quantvla.schemes import Scheme, format_of

MIB = 2**20
FLOAT_BYTES = 4  # an engine for the CPU keeps float weights in 32 bits
FRONTIER_POINTS = 16
_ALL = Default(scheme="float", reason="offered every format")


class SiteChoice(PlannedSite, frozen=True):
    """The format of one site, what it costs, and the nrmse it adds when it is the only integer site."""

    format: str
    bytes: int
    latency_ms: float | None
    nrmse: float


class Point(msgspec.Struct, frozen=True):
    """One choice for all sites: bytes, milliseconds of their kernels a chunk, action error added up and measured."""

    name: str
    mib: float
    latency_ms: float | None
    predicted_nrmse: float
    measured_nrmse: float | None = None


class MixedPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The solved plan. ``frontier`` are the best choices over a range of the first budget.

    ``notes`` are sentences a reader must see: what could not be offered or shown.
    """

    base_recipe: str
    budget_mib: float | None
    budget_ms: float | None
    chosen: Point
    base: Point
    uniform: tuple[Point, ...]
    frontier: tuple[Point, ...]
    sites: tuple[SiteChoice, ...]
    probe_frames: int
    calibration: str
    machine: str | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Costs:
    """Bytes and, where kernels were profiled, milliseconds a chunk of every (site, format name)."""

    bytes: Mapping[tuple[str, str], int]
    latency_ms: Mapping[tuple[str, str], float] | None


@dataclass(frozen=True)
class Problem:
    """Sites, the schemes each is offered, what these cost, and how much of it there is."""

    offered: tuple[tuple[PlanEntry, tuple[Scheme, ...]], ...]
    costs: Costs
    budget_mib: float | None
    budget_ms: float | None

    def budgets(self) -> list[Budget]:
        """Return the budgets that are given, bytes first."""
        found = []
        if self.budget_mib is not None:
            found.append(Budget(self.budget_mib, "weights with their scales", "MiB"))
        if self.budget_ms is not None:
            found.append(Budget(self.budget_ms, "kernel time a chunk", "ms"))
        return found

    def items(self, errors: Mapping[tuple[str, str], float] | None) -> list[list[Option]]:
        """Return the knapsack's items in the order of ``offered``; without ``errors`` all values are 0."""
        return [
            [
                Option(
                    errors[(entry.site, format_name(scheme))] if errors else 0.0,
                    self._option_costs(entry.site, format_name(scheme)),
                )
                for scheme in schemes
            ]
            for entry, schemes in self.offered
        ]

    def check(self) -> None:
        """Raise `QuantVLAError` if no choice fits, before anything is measured."""
        solve(self.items(None), self.budgets())

    def point(self, name: str, choice: Choice, errors: Mapping[tuple[str, str], float]) -> Point:
        """Return the totals of a choice; its squared errors are added up."""
        keys = [(site, format_name(scheme)) for site, (_, scheme) in choice.items()]
        latency = self.costs.latency_ms
        return Point(
            name=name,
            mib=sum(self.costs.bytes[key] for key in keys) / MIB,
            latency_ms=sum(latency[key] for key in keys) if latency is not None else None,
            predicted_nrmse=sqrt(sum(errors[key] for key in keys)),
        )

    def choice(self, solution: Solution) -> dict[str, tuple[PlanEntry, Scheme]]:
        """Return the scheme of every site under a solution."""
        return {
            entry.site: (entry, schemes[index])
            for (entry, schemes), index in zip(self.offered, solution.chosen, strict=True)
        }

    def _option_costs(self, site: str, name: str) -> tuple[float, ...]:
        costs = []
        if self.budget_mib is not None:
            costs.append(self.costs.bytes[(site, name)] / MIB)
        if self.budget_ms is not None:
            assert self.costs.latency_ms is not None
            costs.append(self.costs.latency_ms[(site, name)])
        return tuple(costs)


def weight_bytes(entry: PlanEntry, scheme: Scheme) -> int:
    """Return the bytes of a site's weight in an engine for the CPU."""
    if scheme.is_float:
        return entry.out_features * entry.in_features * FLOAT_BYTES
    return scheme.weight_bytes(entry.out_features, entry.in_features)


def kernels(
    loaded: LoadedPolicy, offered: Sequence[tuple[PlanEntry, Sequence[Scheme]]]
) -> dict[tuple[str, str], Kernel]:
    """Return the kernel of every (site, format name)."""
    shapes = input_shapes(loaded, [entry.site for entry, _ in offered])
    biased = {site.name: site.bias for site in loaded.sites}
    return {
        (entry.site, format_name(scheme)): Kernel(
            shapes[entry.site], entry.out_features, biased[entry.site], format_name(scheme)
        )
        for entry, schemes in offered
        for scheme in schemes
    }


def policy_kernels(loaded: LoadedPolicy, formats: Sequence[Format]) -> list[Kernel]:
    """Return the kernels of all used linears of a policy in all ``formats`` that fit, each once."""
    plan = make_plan(loaded.sites, Recipe(name="all", rules=(), default=_ALL, passes=()))
    offered = [(e, offers(e, formats)) for e in plan.entries if e not in plan.dropped]
    return list(dict.fromkeys(kernels(loaded, offered).values()))


def planned_kernels(loaded: LoadedPolicy) -> list[Kernel]:
    """Return the kernels of the integer linears in place in a quantized policy, each once, in its formats."""
    linears = integer_weights(loaded.policy)
    shapes = input_shapes(loaded, list(linears))
    found = [
        Kernel(
            shapes[name], weight.codes.shape[0], loaded.policy.get_submodule(name).bias is not None,
            format_of(weight.bits, weight.inputs, weight.block),
        )
        for name, weight in linears.items()
        if name in shapes
    ]  # fmt: skip
    return list(dict.fromkeys(found))


def latencies(
    loaded: LoadedPolicy,
    kernel_of: Mapping[tuple[str, str], Kernel],
    median_us: Mapping[Kernel, float],
    stage_of: Mapping[str, str],
) -> dict[tuple[str, str], float]:
    """Return milliseconds a chunk by (site, format name): a denoise site runs at every step."""
    repeats = {stage.name: stage.repeat for stage in loaded.stages}
    return {
        (site, name): median_us[kernel] * repeats[stage_of[site]] / 1e3
        for (site, name), kernel in kernel_of.items()
    }


def uniform_choices(problem: Problem) -> dict[str, Choice]:
    """Return the choice "every site in this format" for each format that all sites are offered."""
    names = [[format_name(s) for s in schemes] for _, schemes in problem.offered]
    common = [name for name in names[0] if all(name in other for other in names)]
    return {
        name: {
            entry.site: (entry, next(s for s in schemes if format_name(s) == name))
            for entry, schemes in problem.offered
        }
        for name in common
    }


def frontier(
    problem: Problem, errors: Mapping[tuple[str, str], float]
) -> list[tuple[float, Choice]]:
    """Return (limit, best choice) for limits of the first budget, evenly spaced by ratio; others are kept."""
    items, (first, *others) = problem.items(errors), problem.budgets()
    low, high = smallest(items, 0), largest(items, 0)
    found: list[tuple[float, Choice]] = []
    for limit in np.geomspace(low, max(high, low), FRONTIER_POINTS):
        # the ends as they are, not as the spacing rounds them
        exact = min(max(float(limit), low), max(high, low))
        try:
            solution = solve(items, [Budget(exact, first.what, first.unit), *others])
        except QuantVLAError:  # this limit and the other budget exclude each other
            continue
        found.append((exact, problem.choice(solution)))
    return found


def best(problem: Problem, errors: Mapping[tuple[str, str], float]) -> Choice:
    """Return the exact solution under the problem's budgets."""
    return problem.choice(solve(problem.items(errors), problem.budgets()))
