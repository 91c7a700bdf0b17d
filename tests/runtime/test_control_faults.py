"""Faults in the middle of a run: the robot is held or stopped, and never moved by them."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from fake_robot import DIM, HORIZON, RATE_HZ, FakeRobot, RampPolicy, make_limits, make_loop

from quantvla.runtime.control.clock import VirtualClock
from quantvla.runtime.control.guard import MotionGuard
from quantvla.runtime.control.loop import ControlLoop, LoopOptions
from quantvla.runtime.control.robot import FinishedError
from quantvla.runtime.control.strategy import Asynchronous
from quantvla.runtime.control.watchdog import WatchdogOptions
from quantvla.runtime.errors import QuantVLAError


def never_moved_after(robot: FakeRobot, tick: int) -> bool:
    """Whether all commands from ``tick`` on are the same target."""
    return float(np.ptp(np.array(robot.actions[tick:]), axis=0).max(initial=0.0)) == 0.0


def raise_at(*calls: int, error: type[Exception] = RuntimeError) -> object:
    def fault(call: int) -> None:
        if call in calls:
            raise error(f"broken at {call}")

    return fault


def test_engine_that_fails_once_is_asked_again() -> None:
    robot = FakeRobot(VirtualClock())
    report = make_loop(Asynchronous(RampPolicy(fault=raise_at(2)), 4), robot).run(ticks=40)
    assert report.inference_errors == 1 and not report.failed and report.starved == 0
    assert np.allclose([a[0] for a in robot.actions], 0.1 * np.arange(1, 41), atol=1e-5)


def test_engine_that_keeps_failing_stops_the_robot() -> None:
    robot = FakeRobot(VirtualClock())
    policy = RampPolicy(fault=raise_at(*range(2, 99)))
    report = make_loop(Asynchronous(policy, 4), robot).run(ticks=100)
    assert report.failed and "3 inferences in a row failed: broken at 4" in report.stop_cause
    assert robot.stops == 1 and robot.acts_after_stop == 0 and report.ticks < 20


def test_engine_that_fails_at_the_start_never_moves_the_robot() -> None:
    robot = FakeRobot(VirtualClock())
    policy = RampPolicy(fault=raise_at(*range(99)))
    report = make_loop(Asynchronous(policy, 4), robot).run(ticks=100)
    assert report.failed and robot.actions == [] and robot.stops == 1


def test_nan_actions_are_held_and_then_stop_the_robot() -> None:
    robot = FakeRobot(VirtualClock())
    bad = np.full((HORIZON, DIM), np.nan, np.float32)
    policy = RampPolicy(fault=lambda call: bad if call >= 2 else None)
    guard = MotionGuard(make_limits(), RATE_HZ, kill_after=6)
    report = make_loop(Asynchronous(policy, 4), robot, guard=guard).run(ticks=100)
    assert np.isfinite(robot.actions).all() and never_moved_after(robot, 7)
    assert report.failed and "6 interventions in a row, last not finite" in report.stop_cause


def test_camera_that_drops_for_three_seconds_holds_and_goes_on() -> None:
    dead = range(30, 60)  # 3 s at 10 Hz
    robot = FakeRobot(VirtualClock(), observe_fault=raise_at(*dead, error=TimeoutError))
    loop = make_loop(Asynchronous(RampPolicy(), 4), robot, watchdog=WatchdogOptions(hold_s=5.0))
    report = loop.run(ticks=100)
    assert not report.failed and report.observation_errors == 30
    values = np.array([a[0] for a in robot.actions])
    moved = np.flatnonzero(np.abs(np.diff(values)) > 1e-6) + 1
    assert not [t for t in moved if 33 <= t <= 59], "moved on observations older than 0.25 s"
    assert moved[-1] > 90 and report.held >= 25
    assert report.interventions == {"stale observation": 5}, "then the plan had ended"


def test_camera_that_drops_for_longer_than_allowed_stops_the_robot() -> None:
    robot = FakeRobot(VirtualClock(), observe_fault=raise_at(*range(30, 999)))
    report = make_loop(Asynchronous(RampPolicy(), 4), robot).run(ticks=200)
    assert report.failed and robot.stops == 1
    last = robot.observed - 1
    why = f"held for 1 s; observation: robot observe failed: broken at {last}"
    assert report.stop_cause == why


def test_frozen_camera_shows_by_its_timestamp() -> None:
    robot = FakeRobot(VirtualClock(), stamp=lambda call, now_s: min(now_s, 3.0))
    report = make_loop(Asynchronous(RampPolicy(), 4), robot).run(ticks=200)
    assert report.failed and "captured" in report.stop_cause and never_moved_after(robot, 34)


@pytest.mark.parametrize("jump_s", [-0.15, -3600.0])
def test_observation_clock_that_goes_backwards_is_not_acted_on(jump_s: float) -> None:
    robot = FakeRobot(
        VirtualClock(), stamp=lambda call, now_s: now_s + (jump_s if call >= 30 else 0.0)
    )
    report = make_loop(Asynchronous(RampPolicy(), 4), robot).run(ticks=100)
    assert report.stale_observations > 0
    if jump_s < -1:
        assert report.failed and "clock went backwards" in report.stop_cause
    else:  # it catches up with itself
        assert not report.failed


def test_timestamps_of_another_clock_are_named() -> None:
    robot = FakeRobot(VirtualClock(), stamp=lambda call, now_s: now_s + 1.7e9)
    report = make_loop(Asynchronous(RampPolicy(), 4), robot).run(ticks=10)
    assert robot.actions == [] and "in the future of time.monotonic" in report.stop_cause


def test_robot_that_raises_is_stopped() -> None:
    robot = FakeRobot(VirtualClock(), act_fault=raise_at(7, error=OSError))
    report = make_loop(Asynchronous(RampPolicy(), 4), robot).run(ticks=40)
    assert report.failed and report.stop_cause == "robot act failed: broken at 7"
    assert len(robot.actions) == 7 and robot.stops == 1


def test_robot_that_is_done_ends_the_run_well() -> None:
    robot = FakeRobot(VirtualClock(), act_fault=raise_at(7, error=FinishedError))
    report = make_loop(Asynchronous(RampPolicy(), 4), robot).run(ticks=40)
    assert not report.failed and report.stop_cause == "broken at 7" and robot.stops == 1


def test_stop_that_fails_is_reported() -> None:
    robot = FakeRobot(VirtualClock())

    def broken() -> None:
        raise OSError("no bus")

    robot.stop = broken  # type: ignore[method-assign]
    report = make_loop(Asynchronous(RampPolicy(), 4), robot).run(ticks=5)
    assert report.failed


def test_an_error_of_the_loop_itself_still_stops_the_robot() -> None:
    robot = FakeRobot(VirtualClock())

    def broken() -> None:
        raise AssertionError("a bug")

    with pytest.raises(AssertionError, match="a bug"):
        make_loop(Asynchronous(RampPolicy(), 4), robot, on_tick=broken).run(ticks=5)
    assert robot.stops == 1


def test_events_are_logged_with_their_cause(caplog: pytest.LogCaptureFixture) -> None:
    robot = FakeRobot(VirtualClock())
    guard = MotionGuard(make_limits(upper=1.0), RATE_HZ)
    with caplog.at_level(logging.WARNING):
        make_loop(Asynchronous(RampPolicy(), 4), robot, guard=guard).run(ticks=15)
    assert "tick 10: tick 10: position: j0 1.1 -> 1" in caplog.text
    assert max(a.max() for a in robot.actions) == 1.0


def test_rate_is_checked() -> None:
    with pytest.raises(QuantVLAError, match="rate_hz: expected a positive number, got 0"):
        ControlLoop(
            FakeRobot(),
            Asynchronous(RampPolicy(), 4),
            rate_hz=0,
            guard=MotionGuard(make_limits(), RATE_HZ),
            options=LoopOptions(),
        )


def test_heartbeat_is_gone_after_the_run(tmp_path: Path) -> None:
    beat = tmp_path / "alive"
    robot = FakeRobot(VirtualClock())
    loop = make_loop(
        Asynchronous(RampPolicy(), 4),
        robot,
        watchdog=WatchdogOptions(heartbeat=beat, heartbeat_s=0.0),
    )
    loop.run(ticks=20)
    assert not beat.exists()
