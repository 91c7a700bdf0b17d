"""LeRobot's robot classes behind the loop's three methods."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from tiny_engine import HEIGHT, WIDTH, make_manifest

from quantvla.robots import lerobot_robot
from quantvla.robots.lerobot_robot import LeRobotAdapter, connect
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.manifest import Manifest

JOINTS = ("shoulder.pos", "elbow.pos", "wrist.pos")


class FakeArm:
    """Three joints and two cameras, two of the joints driven, with lerobot's names for the methods."""

    def __init__(self, config: Any = None) -> None:
        self.config = config
        self.pose = {"shoulder.pos": 1.0, "elbow.pos": 2.0, "wrist.pos": 3.0}
        self.sent: list[dict[str, float]] = []
        self.connected = False

    @property
    def observation_features(self) -> dict[str, Any]:
        image = (HEIGHT, WIDTH, 3)
        return {**dict.fromkeys(JOINTS, float), "front": image, "wrist": image}

    @property
    def action_features(self) -> dict[str, Any]:
        return {"shoulder.pos": float, "elbow.pos": float}

    def connect(self) -> None:
        self.connected = True

    def disconnect(self) -> None:
        self.connected = False

    def get_observation(self) -> dict[str, Any]:
        image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        return {**self.pose, "front": image, "wrist": image + 1}

    def send_action(self, action: dict[str, float]) -> dict[str, float]:
        self.sent.append(action)
        return action


@pytest.fixture
def manifest() -> Manifest:
    return make_manifest()


def test_names_become_vectors_and_back(manifest: Manifest) -> None:
    arm = FakeArm()
    robot = LeRobotAdapter(arm, manifest, task="pick")
    seen = robot.observe()
    assert seen["observation.state"].tolist() == [1, 2, 3] and seen["task"] == "pick"
    assert seen["observation.images.wrist"].max() == 1
    robot.act(np.float32([0.5, -0.5]))
    assert arm.sent == [{"shoulder.pos": 0.5, "elbow.pos": -0.5}]


def test_stop_targets_the_last_measured_pose(manifest: Manifest) -> None:
    arm = FakeArm()
    robot = LeRobotAdapter(arm, manifest, task="pick")
    robot.stop()
    assert arm.sent == [], "nothing measured, nothing to send"
    robot.observe()
    arm.pose = dict.fromkeys(JOINTS, 9.0)
    robot.stop()
    assert arm.sent == [{"shoulder.pos": 1.0, "elbow.pos": 2.0}]


def test_another_robot_is_refused(manifest: Manifest) -> None:
    with pytest.raises(
        QuantVLAError, match=r"robot cameras: the policy needs 'observation\.images\.front', got"
    ):
        LeRobotAdapter(
            FakeArm(), manifest, task="pick", cameras={"front": "observation.images.top"}
        )
    swapped = msgspec.structs.replace(
        manifest,
        state=msgspec.structs.replace(manifest.state, names=("elbow", "shoulder", "wrist")),
    )
    with pytest.raises(
        QuantVLAError,
        match="robot state: the policy's order is elbow, shoulder, wrist, got shoulder",
    ):
        LeRobotAdapter(FakeArm(), swapped, task="pick")
    longer = msgspec.structs.replace(
        manifest, action=msgspec.structs.replace(manifest.action, dim=3)
    )
    with pytest.raises(QuantVLAError, match="robot action: the policy has 3 entries, got 2"):
        LeRobotAdapter(FakeArm(), longer, task="pick")


def test_a_driver_that_cannot_be_closed_is_a_warning(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(arm: FakeArm) -> None:
        raise ConnectionError("port is gone")

    monkeypatch.setattr(FakeArm, "disconnect", fail)
    LeRobotAdapter(FakeArm(), manifest, task="pick").close()
    assert "could not be disconnected, check its torque: port is gone" in caplog.text


def test_robots_without_their_driver_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        if name == "lerobot.robots.an_arm":
            raise ImportError("No module named 'motor'")
        return SimpleNamespace(__path__=[])

    folder = SimpleNamespace(ispkg=True, name="an_arm")
    monkeypatch.setattr(lerobot_robot.importlib, "import_module", load)
    monkeypatch.setattr(lerobot_robot.pkgutil, "iter_modules", lambda path: [folder])
    assert lerobot_robot._register_types() == ["lerobot.robots.an_arm (No module named 'motor')"]


@pytest.mark.slow
def test_a_robot_type_of_lerobot_is_connected(
    manifest: Manifest, tmp_path: Path, monkeypatch: Any
) -> None:
    robots = pytest.importorskip("lerobot.robots")

    @robots.RobotConfig.register_subclass("quantvla_test_arm")
    @dataclass(kw_only=True)
    class FakeArmConfig(robots.RobotConfig):
        port: str

    monkeypatch.setattr(robots, "make_robot_from_config", FakeArm)
    arm = connect("quantvla_test_arm", {"port": "/dev/arm"})
    assert isinstance(arm, FakeArm) and arm.connected and arm.config.port == "/dev/arm"
    robot = LeRobotAdapter(arm, manifest, task="pick")
    robot.close()
    assert not arm.connected
    with pytest.raises(
        QuantVLAError,
        match="robot type: unknown to lerobot, got 'so101_folower'; did you mean 'so101_follower'",
    ):
        connect("so101_folower", {})
    with pytest.raises(
        QuantVLAError, match=r"robot 'quantvla_test_arm': cannot be connected, got .*prt"
    ):
        connect("quantvla_test_arm", {"prt": 1})
