"""A robot that observes and does not move."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.control.robot import Robot
from quantvla.runtime.preprocess import Observation


class DryRobot:
    """Passes observations on and drops actions and ``stop``: nothing reaches the motors."""

    def __init__(self, robot: Robot) -> None:
        self._robot = robot

    def observe(self) -> Observation:
        """Return the robot's observation."""
        return self._robot.observe()

    def act(self, action: NDArray[np.float32]) -> None:
        """Drop the action."""

    def stop(self) -> None:
        """Do nothing."""
