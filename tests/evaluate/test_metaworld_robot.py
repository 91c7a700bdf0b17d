"""A simulator's episode as a robot of the control loop."""

from __future__ import annotations

import numpy as np
import pytest
from fake_simulator import CAMERA, FakeSimulator

from quantvla.evaluate.episode import environment_seed
from quantvla.robots.metaworld import MetaWorldRobot
from quantvla.runtime.control.clock import VirtualClock
from quantvla.runtime.control.guard import MotionGuard
from quantvla.runtime.control.limits import JointLimits, Limits
from quantvla.runtime.control.loop import ControlLoop, LoopOptions
from quantvla.runtime.control.robot import FinishedError
from quantvla.runtime.control.strategy import Synchronous
from quantvla.runtime.control.worker import DelayedWorker
from quantvla.runtime.errors import QuantVLAError

KEYS = (CAMERA, "observation.state", "task")


def open_robot(task: str = "go", episode: int = 0) -> MetaWorldRobot:
    return MetaWorldRobot(task, episode=episode, keys=KEYS, simulator=FakeSimulator())


class GoToGoal:
    def predict_action_chunk(self, obs, /, *, seed=None):  # type: ignore[no-untyped-def]
        return np.repeat(obs["observation.state"][None] / 4, 4, axis=0)


def test_an_episode_ends_the_run_and_says_how() -> None:
    robot = open_robot()
    limits = Limits(
        (JointLimits(name="x", relative=True), JointLimits(name="y", relative=True)), "t"
    )
    loop = ControlLoop(
        robot,
        Synchronous(GoToGoal(), 2),
        rate_hz=10,
        guard=MotionGuard(limits, 10),
        options=LoopOptions(observe_every_tick=False),
        clock=VirtualClock(),
        worker=lambda s: DelayedWorker(s.predict, 0),
    )
    report = loop.run()
    assert robot.solved and report.stop_cause == f"episode solved in {robot.steps} steps"
    assert not report.failed and report.ticks == robot.steps


def test_the_robot_sees_what_the_policy_reads_and_starts_where_the_evaluation_does() -> None:
    robot = open_robot(episode=3)
    seen = robot.observe()
    assert set(seen) == set(KEYS)
    expected = FakeSimulator().open("go").reset(environment_seed(0, 3))
    assert np.array_equal(seen["observation.state"], expected["observation.state"])


def test_after_stop_nothing_moves() -> None:
    robot = open_robot()
    before = robot.observe()["observation.state"]
    robot.stop()
    robot.act(np.ones(2, np.float32))
    assert np.array_equal(robot.observe()["observation.state"], before)


def test_time_runs_out() -> None:
    robot = open_robot()
    with pytest.raises(FinishedError, match="episode not solved in 12 steps"):
        for _ in range(20):
            robot.act(np.zeros(2, np.float32))


def test_unknown_task() -> None:
    with pytest.raises(QuantVLAError, match="tasks: unknown fake task, got 'g'"):
        open_robot("g")
