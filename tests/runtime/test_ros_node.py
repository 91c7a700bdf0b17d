"""The node against a stub of rclpy: lifecycle, topics, units, and what reaches the controller."""

from __future__ import annotations

import importlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ros_stub
from ros_stub import Durability, Image, JointState, Reliability, String, TransitionCallbackReturn
from tiny_engine import HEIGHT, WIDTH

from quantvla.runtime.control.limits import limits_from_manifest
from quantvla.runtime.manifest import read_manifest

STATE = {"wrist_joint": 0.25, "shoulder_joint": 0.5, "elbow_joint": -1.0, "other": 9.0}


@pytest.fixture
def make_node(
    monkeypatch: pytest.MonkeyPatch, pristine_engine: Path
) -> Iterator[Callable[..., Any]]:
    ros_stub.install(monkeypatch)
    sys.modules.pop("quantvla.runtime.ros2.node", None)
    module = importlib.import_module("quantvla.runtime.ros2.node")
    made = []

    def make(**changes: Any) -> Any:
        given = {
            "engine": str(pristine_engine),
            "threads": 1,
            "rate_hz": 50.0,
            "task": "pick up the cup",
            "strategy": "sync",
            "state_joints": ["shoulder_joint", "elbow_joint", "wrist_joint"],
            "command_joints": ["lift", "turn"],
            "command_scale": [2.0],
            "topics.images.front": "/front/image",
            "topics.images.wrist": "/wrist/image",
            "topics.trajectory": "/arm/joint_trajectory",
        }
        monkeypatch.setattr(ros_stub.LifecycleNode, "given", given | changes)
        made.append(module.PolicyNode())
        return made[-1]

    yield make
    for node in made:
        node._release()
    sys.modules.pop("quantvla.runtime.ros2.node", None)


def feed(node: Any, **changes: Any) -> None:
    """Publish one message on every topic that the node reads."""
    image = {"height": HEIGHT, "width": WIDTH, "step": 3 * WIDTH, "data": bytes(3 * HEIGHT * WIDTH)}
    for subscription in node.subscriptions_:
        if subscription.kind is Image:
            subscription.callback(Image(**(image | changes)))
        elif subscription.kind is JointState:
            subscription.callback(JointState(name=list(STATE), position=list(STATE.values())))


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def run_until(node: Any, condition: Callable[[], bool]) -> None:
    def fed() -> bool:
        feed(node)
        return condition()

    wait_for(fed)


def test_from_topics_to_trajectories(make_node: Callable[..., Any], pristine_engine: Path) -> None:
    node = make_node()
    assert node.trigger_configure() is TransitionCallbackReturn.SUCCESS
    (publisher,) = node.publishers_
    assert publisher.topic == "/arm/joint_trajectory"
    assert publisher.qos.reliability is Reliability.RELIABLE
    found = {s.topic: s.qos for s in node.subscriptions_}
    assert set(found) == {"/front/image", "/wrist/image", "joint_states", "instruction"}
    assert found["/front/image"].reliability is Reliability.BEST_EFFORT
    assert found["joint_states"].depth == 1
    assert found["instruction"].durability is Durability.TRANSIENT_LOCAL

    feed(node)
    assert node.trigger_activate() is TransitionCallbackReturn.SUCCESS
    run_until(node, lambda: len(publisher.published) >= 5)
    assert node.trigger_deactivate() is TransitionCallbackReturn.SUCCESS
    *moving, last = publisher.published
    limits = limits_from_manifest(read_manifest(pristine_engine))
    for message in moving:
        assert message.joint_names == ["lift", "turn"]
        (point,) = message.points
        assert point.time_from_start.nanosec == 20_000_000 and point.velocities == []
        commanded = np.array(point.positions) * 2.0  # the policy's units again
        assert (commanded >= limits.bound("lower", -np.inf) - 1e-6).all()
        assert (commanded <= limits.bound("upper", np.inf) + 1e-6).all()
    assert last.points[0].positions == moving[-1].points[0].positions
    assert last.points[0].velocities == [0.0, 0.0], "it comes to rest at the last target"

    count = len(publisher.published)
    feed(node)
    time.sleep(0.1)
    assert len(publisher.published) == count, "inactive means still"
    node.trigger_activate()
    run_until(node, lambda: len(publisher.published) > count)
    node.trigger_deactivate()
    assert node.trigger_cleanup() is TransitionCallbackReturn.SUCCESS
    assert not node.subscriptions_ and not node.publishers_


def test_the_state_is_in_the_policys_order_and_units(make_node: Callable[..., Any]) -> None:
    node = make_node(state_scale=[10.0, 1.0, 2.0])
    node.trigger_configure()
    feed(node)
    observation = node.quantvla_drive.robot.observe()
    np.testing.assert_array_equal(observation["observation.state"], [5.0, -1.0, 0.5])
    assert observation["task"] == "pick up the cup"
    assert observation["timestamp"] == pytest.approx(time.monotonic(), abs=1.0)


def test_the_instruction_can_change(make_node: Callable[..., Any]) -> None:
    node = make_node(task="")
    node.trigger_configure()
    feed(node)
    with pytest.raises(Exception, match="instruction: none received"):
        node.quantvla_drive.robot.observe()
    for subscription in node.subscriptions_:
        if subscription.kind is String:
            subscription.callback(String(data="pick"))
    assert node.quantvla_drive.robot.observe()["task"] == "pick"


def test_nothing_moves_without_all_topics(make_node: Callable[..., Any]) -> None:
    node = make_node()
    node.trigger_configure()
    node.trigger_activate()
    (publisher,) = node.publishers_
    time.sleep(0.3)
    assert publisher.published == []
    with pytest.raises(Exception, match=r"'observation.images.front': nothing received"):
        node.quantvla_drive.robot.observe()


def test_a_camera_that_turns_grey_stops_the_motion(make_node: Callable[..., Any]) -> None:
    node = make_node(max_age_s=0.1)
    node.trigger_configure()
    feed(node)
    node.trigger_activate()
    (publisher,) = node.publishers_
    run_until(node, lambda: len(publisher.published) >= 3)
    feed(node, encoding="mono8")
    time.sleep(0.3)
    held = publisher.published[-1].points[0].positions
    feed(node, encoding="mono8")
    time.sleep(0.1)
    assert publisher.published[-1].points[0].positions == held
    with pytest.raises(Exception, match="got 'mono8'"):
        node.quantvla_drive.robot.observe()
    node.trigger_deactivate()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"engine": ""}, "parameter 'engine': is missing"),
        ({"engine": "/no/such/engine"}, "not an engine directory"),
        ({"topics.images.wrist": ""}, "'topics.images.wrist': is missing"),
        ({"command_joints": ["lift"]}, "expected 2 different joint names"),
        ({"execute": 99}, "expected 1 to 4 actions"),
        ({"limits_file": "/no/such/file"}, "no such file"),
        ({"strategy": "fast"}, "Invalid enum value 'fast'"),
    ],
)
def test_bad_parameters_fail_to_configure_in_words(
    make_node: Callable[..., Any], changes: dict[str, Any], match: str
) -> None:
    node = make_node(**changes)
    assert node.trigger_configure() is TransitionCallbackReturn.FAILURE
    assert node.state == "unconfigured" and not node.subscriptions_ and not node.publishers_
    (error,) = [text for level, text in node.logged if level == "error"]
    assert match in error


def test_what_a_transition_raises_is_in_the_log(
    make_node: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("invalid topic name")

    node = make_node()
    monkeypatch.setattr(node, "create_subscription", refuse)
    assert node.trigger_configure() is TransitionCallbackReturn.ERROR
    assert ("error", "ValueError: invalid topic name") in node.logged
    assert node.quantvla_drive is None and not node.publishers_


def test_a_loop_that_ends_by_itself_says_why(make_node: Callable[..., Any]) -> None:
    node = make_node()
    node.trigger_configure()
    feed(node)
    node.quantvla_drive.policy.close()  # every inference fails from here on
    node.trigger_activate()
    wait_for(lambda: (feed(node), not node.quantvla_drive.running)[1])
    assert node.publishers_[0].published == []
    assert any(level == "error" and "stopped" in text for level, text in node.logged)


def test_main_starts_by_itself_and_stops_the_robot_on_sigterm(
    make_node: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["quantvla.runtime.ros2.node"]
    make_node(autostart=True)  # sets the parameters
    seen: list[Any] = []

    def on_spin(node: Any) -> None:
        seen[:] = [node, *node.publishers_]
        feed(node)
        time.sleep(0.01)
        if len(node.publishers_[0].published) >= 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ros_stub.Executor, "on_spin", staticmethod(on_spin), raising=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        module.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    node, publisher = seen
    assert node.state == "finalized" and node.destroyed
    assert publisher.published[-1].points[0].velocities == [0.0, 0.0]


def test_the_documented_parameters_are_the_nodes(make_node: Callable[..., Any]) -> None:
    import yaml

    text = (Path(__file__).parents[2] / "docs" / "ros2.md").read_text()
    block = text.split("```yaml\n")[1].split("```")[0]
    parameters = yaml.safe_load(block)["quantvla"]["ros__parameters"]
    topics = parameters.pop("topics")
    names = {*parameters, *(f"topics.{name}" for name in topics if name != "images")}
    node = make_node(**parameters)  # the stub refuses another type, as ROS does
    assert names <= node.parameters.keys()
    for name in node.parameters:
        assert name.startswith("topics.") or f"`{name}`" in text or name in block, name
