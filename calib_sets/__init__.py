"""Calibration sets: observations of a robot with a card, read, recorded, selected and checked.

Torch-free: a robot records and reads sets with the base install. Only LeRobotDataset sources need
lerobot, which is imported when one is opened.
"""

from quantvla.calib_sets.calibration_set import CalibrationSet, Frame, limit, of_tasks, select
from quantvla.calib_sets.card import Card, Part, RobotSpec, Selection, SetSource
from quantvla.calib_sets.observation import Observation
from quantvla.calib_sets.opening import open_set
from quantvla.calib_sets.recorder import Recorder, record
from quantvla.calib_sets.robot import check_robot
from quantvla.calib_sets.writer import build_set

__all__ = [
    "CalibrationSet",
    "Card",
    "Frame",
    "Observation",
    "Part",
    "Recorder",
    "RobotSpec",
    "Selection",
    "SetSource",
    "build_set",
    "check_robot",
    "limit",
    "of_tasks",
    "open_set",
    "record",
    "select",
]
