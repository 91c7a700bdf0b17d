"""The multiple-choice knapsack, solved exactly: one option for each item, least total value, within all budgets."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, vstack

from quantvla.runtime.errors import explain

_VALUE_RANGE = 1e3  # HiGHS stops at a gap of 1e-6, which is then 1e-9 of the values
_REPAIRS = 20


@dataclass(frozen=True)
class Option:
    """One choice for an item: what it adds to the objective, and what it takes of every budget."""

    value: float
    costs: tuple[float, ...]


@dataclass(frozen=True)
class Budget:
    """How much of one resource there is, and its name with unit for messages."""

    limit: float
    what: str
    unit: str


@dataclass(frozen=True)
class Solution:
    """The chosen option of every item, by position, and the totals."""

    chosen: tuple[int, ...]
    value: float
    costs: tuple[float, ...]


Items = Sequence[Sequence[Option]]


def solve(items: Items, budgets: Sequence[Budget]) -> Solution:
    """Return the choice of least total value whose total costs are within all ``budgets``.

    Exact: a 0/1 programme with one equation an item, solved by HiGHS without a gap. An option's
    ``costs`` are in the order of ``budgets``. Raises `QuantVLAError` naming the smallest feasible
    budget when none is.
    """
    for index, budget in enumerate(budgets):
        _require_feasible(items, index, budget)
    limits = np.array([budget.limit for budget in budgets])
    tightened = limits.copy()
    for _ in range(_REPAIRS):
        chosen = _programme(items, tightened)
        if chosen is None:
            break
        found = total(items, chosen)
        excess = np.array(found.costs) - limits
        if bool((excess <= 0).all()):
            return found
        # within HiGHS' feasibility tolerance, but over a limit: ask for that much less
        tightened = np.where(excess > 0, np.nextafter(tightened - excess, -np.inf), tightened)
    named = " and ".join(f"{budget.limit:g} {budget.unit} of {budget.what}" for budget in budgets)
    raise explain(
        "budgets",
        "each is feasible alone, but no choice keeps all of them",
        got=named,
        remedy="raise one of them",
    )


def smallest(items: Items, index: int) -> float:
    """Return the least total cost in the resource at ``index``."""
    return float(sum(min(option.costs[index] for option in options) for options in items))


def largest(items: Items, index: int) -> float:
    """Return the total cost in the resource at ``index`` of the best values, whatever they cost."""
    best = (
        min(options, key=lambda option: (option.value, option.costs[index])) for options in items
    )
    return float(sum(option.costs[index] for option in best))


def total(items: Items, chosen: Sequence[int]) -> Solution:
    """Return the totals of a choice."""
    options = [options[index] for options, index in zip(items, chosen, strict=True)]
    costs = zip(*(option.costs for option in options), strict=True)
    return Solution(
        tuple(chosen), float(sum(o.value for o in options)), tuple(float(sum(c)) for c in costs)
    )


def _require_feasible(items: Items, index: int, budget: Budget) -> None:
    least = smallest(items, index)
    if least > budget.limit:
        raise explain(
            f"budget of {budget.what}",
            "no choice of formats is that small",
            got=f"{budget.limit:g} {budget.unit}",
            remedy=f"the smallest feasible budget is {_ceiling(least):g} {budget.unit}",
        )


def _ceiling(value: float) -> float:
    """Return ``value`` rounded up to four significant digits, so that the printed number is feasible."""
    if value <= 0:
        return value
    step = 10.0 ** (np.floor(np.log10(value)) - 3)
    return float(np.ceil(value / step) * step)


def _programme(items: Items, limits: NDArray[np.float64]) -> list[int] | None:
    flat = [option for options in items for option in options]
    counts = [len(options) for options in items]
    owner = np.repeat(np.arange(len(items)), counts)
    one_each = csr_array((np.ones(len(flat)), (owner, np.arange(len(flat)))))
    costs = np.array([option.costs for option in flat]).T
    scale = np.maximum(np.abs(costs).max(axis=1), 1e-300)
    rows = vstack([one_each, csr_array(costs / scale[:, None])]) if len(limits) else one_each
    ones = np.ones(len(items))
    low = np.concatenate([ones, np.full(len(limits), -np.inf)])
    high = np.concatenate([ones, limits / scale])
    values = np.array([option.value for option in flat])
    with _stdout_to_stderr():
        result = milp(
            values * (_VALUE_RANGE / max(float(np.abs(values).max()), 1e-300)),
            constraints=LinearConstraint(rows, low, high),
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
    if result.x is None:
        return None
    edges = np.concatenate([[0], np.cumsum(counts)])
    return [int(np.argmax(result.x[a:b])) for a, b in pairwise(edges)]


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send what native code prints on stdout to stderr: HiGHS prints remarks that `disp=False` leaves in."""
    library = ctypes.CDLL(None)
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        library.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
