"""The robot side of the loop: calls the robot under the watchdog, and takes whatever its drivers raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.control.clock import Clock
from quantvla.runtime.control.counters import Samples
from quantvla.runtime.control.feed import ObservationFeed
from quantvla.runtime.control.notes import Notes
from quantvla.runtime.control.robot import FinishedError, Robot
from quantvla.runtime.control.watchdog import Watchdog

FloatArray = NDArray[np.float32]


class RobotLink:
    """Calls a robot. ``problem``: what is wrong with the observations now; ``spent_s``: time in its calls."""

    def __init__(
        self, robot: Robot, watchdog: Watchdog, clock: Clock, notes: Notes, max_age_s: float
    ) -> None:
        self.feed = ObservationFeed(max_age_s)
        self.problem: str | None = None
        self.spent_s = 0.0
        self._robot, self._watchdog, self._clock, self._notes = robot, watchdog, clock, notes

    def fresh(self) -> bool:
        """Return whether the newest good observation is young enough."""
        return self.feed.fresh(self._clock.now())

    def act(self, action: FloatArray) -> None:
        """Send an action; a robot that raises ends the run."""
        with self._timed("act", self._notes.counters.act_s):
            try:
                self._robot.act(action)
            except FinishedError as finished:
                self._notes.stop(str(finished) or "the robot has finished")
            except Exception as error:  # whatever a driver raises
                self._notes.stop(f"robot act failed: {error}", failed=True)

    def observe(self) -> None:
        """Ask for an observation; afterwards ``problem`` says whether there is a good one."""
        observation, raised = None, None
        with self._timed("observe", self._notes.counters.observe_s):
            try:
                observation = self._robot.observe()
            except FinishedError as finished:
                self._notes.stop(str(finished) or "the robot has finished")
                return
            except Exception as error:  # whatever a camera driver raises
                self._notes.counters.observation_errors += 1
                raised = f"robot observe failed: {error}"
        problem = self.feed.accept(observation, self._clock.now())
        self._note(raised or problem)

    def stop(self) -> None:
        """Stop the robot; an error is noted, since there is nothing else to be done."""
        try:
            self._robot.stop()
        except Exception as error:
            self._notes.failed = True
            self._notes.event(f"robot stop failed: {error}")

    def _note(self, problem: str | None) -> None:
        """Count a bad observation; log when they go bad and when they are good again, not every tick between."""
        self._notes.counters.stale_observations += problem is not None
        if (problem is None) != (self.problem is None):
            self._notes.event(f"observation: {problem or 'good again'}")
        self.problem = problem

    @contextmanager
    def _timed(self, what: str, into: Samples) -> Iterator[None]:
        begin_s = self._clock.now()
        with self._watchdog.call(what):
            yield
        spent_s = self._clock.now() - begin_s
        self.spent_s += spent_s
        into.add(spent_s)
