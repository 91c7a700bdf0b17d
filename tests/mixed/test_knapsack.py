from __future__ import annotations

import ctypes
import itertools
from typing import Any

import numpy as np
import pytest
from scipy.optimize import milp

from quantvla.mixed import knapsack
from quantvla.mixed.knapsack import Budget, Option, largest, smallest, solve, total
from quantvla.runtime.errors import QuantVLAError

Items = list[list[Option]]


def instance(seed: int, resources: int = 1) -> Items:
    """Integer-like costs and values over six orders of magnitude, as bytes and action errors are."""
    rng = np.random.default_rng(seed)
    return [
        [
            Option(
                float(10 ** rng.uniform(-8, -2)),
                tuple(float(c) for c in rng.integers(1, 10**6, resources)),
            )
            for _ in range(rng.integers(2, 5))
        ]
        for _ in range(6)
    ]


def brute_force(items: Items, limits: list[float]) -> float:
    found = [
        total(items, choice)
        for choice in itertools.product(*(range(len(options)) for options in items))
    ]
    return min(
        solution.value
        for solution in found
        if all(c <= limit for c, limit in zip(solution.costs, limits, strict=True))
    )


def budgets(limits: list[float]) -> list[Budget]:
    return [Budget(limit, f"resource {i}", "B") for i, limit in enumerate(limits)]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 1.0])
def test_the_solution_is_the_best_of_all(seed: int, share: float) -> None:
    items = instance(seed)
    low, high = smallest(items, 0), largest(items, 0)
    limit = low + share * max(high - low, 0)
    found = solve(items, budgets([limit]))
    assert found.costs[0] <= limit
    assert found.value == pytest.approx(brute_force(items, [limit]), rel=1e-9)
    assert found == total(items, found.chosen)


@pytest.mark.parametrize("seed", range(6))
def test_two_budgets_hold_together(seed: int) -> None:
    items = instance(seed, resources=2)
    # a choice that exists, so that both limits can be kept
    limits = [1.05 * c for c in total(items, [0] * len(items)).costs]
    found = solve(items, budgets(limits))
    assert all(c <= limit for c, limit in zip(found.costs, limits, strict=True))
    assert found.value == pytest.approx(brute_force(items, limits), rel=1e-9)


def test_a_larger_budget_is_never_worse_and_a_loose_one_gives_the_best_values() -> None:
    items = instance(3)
    low, high = smallest(items, 0), largest(items, 0)
    values = [solve(items, budgets([b])).value for b in np.linspace(low, max(high, low), 7)]
    assert values == sorted(values, reverse=True)
    best = sum(min(option.value for option in options) for options in items)
    assert values[-1] == pytest.approx(best)


def test_an_infeasible_budget_names_the_smallest_feasible_one() -> None:
    items = [[Option(1.0, (3.0,)), Option(0.5, (7.0,))], [Option(2.0, (5.5,))]]
    with pytest.raises(
        QuantVLAError,
        match=r"^budget of resource 0: no choice of formats is that small, got 8 B; "
        r"the smallest feasible budget is 8\.5 B$",
    ):
        solve(items, budgets([8.0]))
    assert solve(items, budgets([8.5])).chosen == (0, 0)


def test_budgets_that_exclude_each_other_are_an_error() -> None:
    items = [[Option(1.0, (1.0, 9.0)), Option(1.0, (9.0, 1.0))]]
    with pytest.raises(QuantVLAError, match="each is feasible alone, but no choice keeps all"):
        solve(items, budgets([2.0, 2.0]))


def test_no_budget_takes_the_best_value_of_every_item() -> None:
    items = instance(1)
    found = solve(items, [])
    assert found.value == sum(min(option.value for option in options) for options in items)


def test_what_the_solver_prints_does_not_reach_stdout(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def talkative(*arguments: Any, **options: Any) -> Any:
        ctypes.CDLL(None).printf(b"a remark\n")
        return milp(*arguments, **options)

    monkeypatch.setattr(knapsack, "milp", talkative)
    solve(instance(0), [])
    print("result")
    captured = capfd.readouterr()
    assert captured.out == "result\n" and captured.err == "a remark\n"
