"""What the control loop needs of a robot."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.preprocess import Observation

FloatArray = NDArray[np.float32]
TIMESTAMP_KEY = "timestamp"
"""Optional key of an observation: `time.monotonic` seconds at which its oldest part was captured."""


class FinishedError(Exception):
    """Raised by a robot's ``observe`` or ``act`` when there is nothing left to do: the loop ends well."""


class Robot(Protocol):
    """Three methods, called from the thread that runs the loop.

    ``stop`` may also come from the watchdog's thread, while another call is stuck.
    """

    def observe(self) -> Observation:
        """Return the latest observation: images (height, width, 3) uint8 RGB, raw state, the task.

        Must not wait for a new picture, and must not change the arrays afterwards. ``timestamp``
        in it says when it was captured; without it, it counts as captured when this returns. Any
        exception means that there is no observation now.
        """
        ...

    def act(self, action: FloatArray) -> None:
        """Send one action (dim,) in physical units to the motors and return without waiting for the motion."""
        ...

    def stop(self) -> None:
        """Bring the robot to rest and keep it there; called once at the end of every run. Calling it again is fine."""
        ...
