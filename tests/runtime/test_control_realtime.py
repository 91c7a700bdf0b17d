"""The loop on the real clock with real threads: short, and tolerant of a busy machine."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from fake_robot import FakeRobot, RampPolicy, make_limits

from quantvla.runtime.control.guard import MotionGuard
from quantvla.runtime.control.loop import ControlLoop, LoopOptions
from quantvla.runtime.control.strategy import Asynchronous, Synchronous
from quantvla.runtime.control.watchdog import Watchdog, WatchdogOptions

RATE_HZ = 50.0


def real_loop(robot: FakeRobot, policy: RampPolicy, **options: float | Path) -> ControlLoop:
    return ControlLoop(
        robot,
        Asynchronous(policy, 4),
        rate_hz=RATE_HZ,
        guard=MotionGuard(make_limits(), RATE_HZ),
        options=LoopOptions(max_age_s=1.0),
        watchdog=WatchdogOptions(**options),  # type: ignore[arg-type]
    )


def test_ticks_keep_to_absolute_deadlines() -> None:
    robot = FakeRobot()
    policy = RampPolicy(fault=lambda call: time.sleep(0.03))
    threads_before = set(threading.enumerate())
    start_s = time.monotonic()
    report = real_loop(robot, policy).run(seconds=1.0)
    assert report.ticks + report.skipped_ticks == 50
    assert 0.95 < time.monotonic() - start_s < 3.0
    assert report.inferences >= 5 and robot.stops == 1
    assert report.inference_ms.p50 >= 30 and not report.failed
    assert set(threading.enumerate()) <= threads_before


def test_robot_act_that_blocks_trips_the_watchdog_and_nothing_is_sent_after() -> None:
    release = threading.Event()

    def block(call: int) -> None:
        if call == 5:
            release.wait(20.0)

    robot = FakeRobot(act_fault=block)
    stopped = threading.Event()
    plain_stop = robot.stop

    def stop() -> None:
        plain_stop()
        stopped.set()

    robot.stop = stop  # type: ignore[method-assign]
    threading.Thread(
        target=lambda: (stopped.wait(20.0), time.sleep(0.05), release.set()), daemon=True
    ).start()
    report = real_loop(robot, RampPolicy(), robot_s=0.2).run(seconds=30)
    assert report.failed and report.stop_cause == "robot act has not returned for 0.2 s"
    assert len(robot.actions) == 6, "only the command that was stuck came through"
    assert robot.stops == 2  # from the watchdog at once, and at the end


def test_a_stop_that_fails_in_the_watchdog_is_part_of_the_cause() -> None:
    def stop() -> None:
        raise OSError("no bus")

    watchdog = Watchdog(stop, WatchdogOptions(robot_s=0.02))
    end_s = time.monotonic() + 20.0
    with watchdog.watching(), watchdog.call("act"):
        while "no bus" not in (watchdog.tripped or "") and time.monotonic() < end_s:
            time.sleep(0.01)
    assert watchdog.tripped == "robot act has not returned for 0.02 s; its stop failed: no bus"


def test_inference_that_hangs_holds_and_then_stops() -> None:
    hang = threading.Event()
    robot = FakeRobot()
    policy = RampPolicy(fault=lambda call: hang.wait(20.0) if call == 2 else None)
    report = real_loop(robot, policy, inference_s=0.6).run(seconds=30)
    hang.set()
    assert report.failed and report.stop_cause == "an inference has run for 0.6 s"
    assert np.ptp(np.array(robot.actions[-5:]), axis=0).max() == 0 and report.starved > 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_the_run_between_two_ticks(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    robot = FakeRobot(act_fault=lambda call: os.kill(os.getpid(), number) if call == 5 else None)
    report = real_loop(robot, RampPolicy()).run(seconds=30)
    assert report.stop_cause == number.name and not report.failed
    assert robot.stops == 1 and robot.acts_after_stop == 0
    assert signal.getsignal(number) is before


def test_a_second_signal_stops_the_robot_at_once() -> None:
    def twice(call: int) -> None:
        if call == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    robot = FakeRobot(act_fault=twice)
    report = real_loop(robot, RampPolicy()).run(seconds=30)
    assert report.stop_cause == "SIGINT" and robot.stops == 2


def test_heartbeat_is_renewed_while_the_loop_ticks(tmp_path: Path) -> None:
    beat, seen = tmp_path / "alive", []
    robot = FakeRobot(observe_fault=lambda call: seen.append(beat.exists()))
    real_loop(robot, RampPolicy(), heartbeat=beat, heartbeat_s=0.05).run(seconds=0.6)
    assert any(seen) and not beat.exists()


def test_synchronous_in_real_time_holds_during_inference() -> None:
    robot = FakeRobot()
    policy = RampPolicy(fault=lambda call: time.sleep(0.05))
    loop = ControlLoop(
        robot,
        Synchronous(policy, 4),
        rate_hz=RATE_HZ,
        guard=MotionGuard(make_limits(), RATE_HZ),
        options=LoopOptions(max_age_s=1.0),
    )
    report = loop.run(seconds=0.8)
    assert report.starved > 0 and (np.diff([a[0] for a in robot.actions]) >= -1e-6).all()
