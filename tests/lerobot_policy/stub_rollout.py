"""lerobot's own rollout script on a robot that is only numbers; writes what it showed and what it was sent.

usage: stub_rollout.py RECORD.npz [arguments of lerobot-rollout]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from lerobot.robots import Robot, RobotConfig
from lerobot.scripts.lerobot_rollout import main

JOINTS = ("shoulder.pos", "elbow.pos", "wrist.pos", "gripper.pos")
record = sys.argv.pop(1)
shown: list[dict[str, Any]] = []
sent: list[list[float]] = []


@RobotConfig.register_subclass("numbers")
@dataclass
class NumbersConfig(RobotConfig):
    """A robot of four joints and one camera, called "top"."""


class Numbers(Robot):
    """Shows noise, remembers commands."""

    config_class, name = NumbersConfig, "numbers"

    def __init__(self, config: NumbersConfig) -> None:
        super().__init__(config)
        self._rng = np.random.default_rng(0)
        self.is_connected = False

    @cached_property
    def observation_features(self) -> dict[str, Any]:
        return {**dict.fromkeys(JOINTS, float), "top": (480, 480, 3)}

    @cached_property
    def action_features(self) -> dict[str, Any]:
        return dict.fromkeys(JOINTS, float)

    is_connected = False
    is_calibrated = True

    def connect(self, calibrate: bool = True) -> None:
        self.is_connected = True

    def disconnect(self) -> None:
        self.is_connected = False

    def calibrate(self) -> None: ...

    def configure(self) -> None: ...

    def get_observation(self) -> dict[str, Any]:
        joints = {name: float(self._rng.standard_normal()) for name in JOINTS}
        shown.append({**joints, "top": self._rng.integers(0, 256, (480, 480, 3), dtype=np.uint8)})
        return dict(shown[-1])

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        sent.append([action[name] for name in JOINTS])
        return action


main()
np.savez(
    record,
    top=np.stack([observation["top"] for observation in shown]),
    state=np.array([[observation[name] for name in JOINTS] for observation in shown]),
    actions=np.array(sent),
)
