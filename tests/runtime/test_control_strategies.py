"""Plans and chunk strategies: which action is meant for which tick."""

from __future__ import annotations

import numpy as np
import pytest
from fake_robot import HORIZON, FakeRobot, RampPolicy, make_loop

from quantvla.runtime.control.clock import VirtualClock
from quantvla.runtime.control.delay import DelayEstimate
from quantvla.runtime.control.plan import Plan, empty_plan
from quantvla.runtime.control.strategy import Asynchronous, Blending, Synchronous, check_execute
from quantvla.runtime.errors import QuantVLAError


def chunk(first: float, rows: int = HORIZON) -> np.ndarray:
    return (first + np.arange(rows, dtype=np.float32))[:, None]


def test_a_plan_maps_ticks_to_rows() -> None:
    plan = Plan(5, chunk(10.0))
    assert plan.at(4) is None and plan.at(5) == [10.0] and plan.at(12) == [17.0]
    assert plan.at(13) is None
    assert plan.remaining(0) == 8 and plan.remaining(7) == 6 and plan.remaining(99) == 0
    assert plan.ahead(7)[:, 0].tolist() == [12, 13, 14, 15, 16, 17]
    assert empty_plan(3).at(0) is None and empty_plan(3).ahead(0).shape == (0, 3)


def test_synchronous_waits_and_starts_when_the_chunk_is_there() -> None:
    sync = Synchronous(RampPolicy(), execute=3)
    plan = sync.merge(empty_plan(), chunk(0.0), 4, 9)
    assert plan is not None and plan.start == 9 and len(plan.actions) == 3
    assert not sync.wants(plan, 11, 0) and sync.wants(plan, 12, 0)


@pytest.mark.parametrize("delay", [0, 2, 5])
def test_asynchronous_drops_rows_whose_ticks_passed(delay: int) -> None:
    plan = Asynchronous(RampPolicy(), 4).merge(empty_plan(), chunk(0.0), 10, 10 + delay)
    assert plan is not None and plan.at(10 + delay) == [delay]


def test_a_chunk_that_comes_after_its_last_row_is_of_no_use() -> None:
    for strategy in (Asynchronous(RampPolicy(), 4), Blending(RampPolicy(), 4, 2)):
        assert strategy.merge(empty_plan(), chunk(0.0), 10, 10 + HORIZON) is None


def test_asynchronous_asks_early_enough_for_the_measured_delay() -> None:
    plan = Plan(0, chunk(0.0))
    assert [t for t in range(HORIZON) if Asynchronous(RampPolicy(), 6).wants(plan, t, 0)] == [6, 7]
    assert next(t for t in range(HORIZON) if Asynchronous(RampPolicy(), 6).wants(plan, t, 5)) == 3


def test_blending_slides_from_the_old_chunk_to_the_new() -> None:
    old, new = Plan(0, np.zeros((8, 1), np.float32)), np.ones((8, 1), np.float32)
    plan = Blending(RampPolicy(), 4, 3).merge(old, new, 2, 4)
    assert plan is not None
    assert [float(plan.at(t)[0]) for t in range(4, 8)] == [0.25, 0.5, 0.75, 1.0]
    short = Blending(RampPolicy(), 4, 9).merge(Plan(0, np.zeros((5, 1), np.float32)), new, 2, 4)
    assert short is not None and [float(short.at(t)[0]) for t in (4, 5)] == [0.5, 1.0]


def test_the_delay_is_the_largest_of_the_last_ones() -> None:
    delay = DelayEstimate(window=3)
    assert delay.ticks == 0
    for ticks in (9, 1, 2, 3):
        delay.add(ticks)
    assert delay.ticks == 3


def test_execute_is_checked() -> None:
    with pytest.raises(
        QuantVLAError, match="strategy execute: expected 1 to 8 actions of a chunk, got 9"
    ):
        check_execute(9, 8)


def test_synchronous_loop_executes_without_gaps_when_inference_is_instant() -> None:
    robot = FakeRobot(VirtualClock())
    report = make_loop(Synchronous(RampPolicy(), 4), robot).run(ticks=20)
    assert np.allclose([a[0] for a in robot.actions], 0.1 * np.arange(1, 21), atol=1e-5)
    assert report.held == 0 and report.inferences == 5 and report.stop_cause == "time is up"


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_synchronous_loop_holds_the_last_target_while_it_waits(delay: int) -> None:
    robot = FakeRobot(VirtualClock())
    report = make_loop(Synchronous(RampPolicy(), 4), robot, delay_ticks=delay).run(ticks=20)
    values = np.array([a[0] for a in robot.actions])
    assert len(values) == 20 and (np.diff(values) >= -1e-6).all()
    assert report.starved == report.held == (np.abs(np.diff(values)) < 1e-6).sum()
    assert report.starved == {0: 0, 1: 4, 3: 8}[delay]  # 4 actions, then `delay` holds


@pytest.mark.parametrize("delay", [0, 1, 2, 4])
def test_asynchronous_loop_never_starves_when_the_delay_fits(delay: int) -> None:
    robot = FakeRobot(VirtualClock())
    report = make_loop(Asynchronous(RampPolicy(), 4), robot, delay_ticks=delay).run(ticks=40)
    assert report.starved == 0 and report.discarded_chunks == 0
    assert report.delay_ticks.max == delay
    # The policy continues its own ramp: only rows matched to their ticks give an even one.
    assert np.allclose([a[0] for a in robot.actions], 0.1 * np.arange(1, 41), atol=1e-5)
    assert report.seam_step.max == pytest.approx(0.1, abs=1e-5)


def test_asynchronous_loop_discards_and_holds_when_the_delay_exceeds_the_chunk() -> None:
    robot = FakeRobot(VirtualClock())
    loop = make_loop(Asynchronous(RampPolicy(), 4), robot, delay_ticks=HORIZON + 1)
    report = loop.run(ticks=60)
    assert report.discarded_chunks > 0 and report.failed and "held for 1 s" in report.stop_cause
    assert np.ptp([a[0] for a in robot.actions[-5:]]) == 0 and robot.stops == 1
