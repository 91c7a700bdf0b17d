"""Reading our own format: a directory with ``card.json`` and ``images/``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantvla.calib_sets.calibration_set import CalibrationSet
from quantvla.calib_sets.card import Card
from quantvla.calib_sets.card_file import check_images, read_card
from quantvla.calib_sets.images import decode_image
from quantvla.calib_sets.observation import TASK_KEY, Observation


@dataclass(frozen=True)
class StoredFrames:
    """Loads the frames of a stored set, in the order of its card."""

    directory: Path
    card: Card

    def load(self, index: int) -> Observation:
        """Return the observation of frame ``index`` of the card."""
        entry = self.card.frames[index]
        observation: Observation = {
            camera.key: decode_image(self.directory / entry.images[camera.key].file, camera)
            for camera in self.card.robot.cameras
        }
        observation[self.card.robot.state.key] = np.array(entry.state, dtype=np.float32)
        observation[TASK_KEY] = self.card.tasks[entry.task]
        return observation


def open_stored(directory: Path) -> CalibrationSet:
    """Return the set in ``directory``; the checksum of every file is verified here, once."""
    card = read_card(directory)
    check_images(directory, card)
    return CalibrationSet(
        card=card,
        entries=card.frames,
        positions=tuple(range(len(card.frames))),
        loader=StoredFrames(directory, card),
    )
