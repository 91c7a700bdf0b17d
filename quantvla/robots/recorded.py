"""A robot that sees what was recorded and moves nothing: for trying an engine and a rate without hardware."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantvla.calib_sets import check_robot, open_set
from quantvla.runtime.control.robot import FinishedError
from quantvla.runtime.manifest import Manifest
from quantvla.runtime.preprocess import Observation


class RecordedRobot:
    """Shows the frames of a calibration set or LeRobotDataset, the next one after every action.

    The frames are read into memory at the start. At their end it begins anew if ``repeat``, else
    it raises `FinishedError`.
    """

    def __init__(
        self, directory: Path, manifest: Manifest, *, frames: int = 64, repeat: bool = True
    ) -> None:
        """Read up to ``frames`` frames; raises `QuantVLAError` for a path that is no set of the engine's robot."""
        recorded = open_set(directory)
        check_robot(recorded.robot, manifest.cameras, manifest.state, where=directory)
        keys = manifest.observation_keys
        self._frames: list[Observation] = [
            {k: v for k, v in frame.observation.items() if k in keys}
            for frame in islice(recorded, frames)
        ]
        self._repeat = repeat
        self._index = 0

    def observe(self) -> Observation:
        """Return the present frame."""
        if self._index >= len(self._frames):
            if not self._repeat:
                raise FinishedError("the recording is at its end")
            self._index = 0
        return self._frames[self._index]

    def act(self, action: NDArray[np.float32]) -> None:
        """Go on to the next frame."""
        self._index += 1

    def stop(self) -> None:
        """Stand still."""
