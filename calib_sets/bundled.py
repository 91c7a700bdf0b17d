"""The calibration sets that come with a clone of this repository."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantvla.calib_sets.calibration_set import CalibrationSet
from quantvla.calib_sets.card_file import CARD_FILE
from quantvla.calib_sets.opening import open_set
from quantvla.calib_sets.robot import check_robot
from quantvla.runtime.errors import QuantVLAError, explain
from quantvla.runtime.manifest import CameraSpec, VectorSpec


def bundled_set(cameras: Sequence[CameraSpec], state: VectorSpec) -> CalibrationSet:
    """Return the bundled set recorded with this robot; there may be none."""
    for card in sorted(Path(__file__).parent.glob(f"*/{CARD_FILE}")):
        found = open_set(card.parent)
        try:
            check_robot(found.robot, cameras, state, where=card.parent.name)
        except QuantVLAError:
            continue
        return found
    raise explain(
        "calibration set",
        "none of the bundled ones has this robot's cameras and state",
        remedy="pass --calib SET",
    )
