"""The calls of rclpy that the node makes, with ROS's rules for them: types, states and quality of service."""

from __future__ import annotations

import enum
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest


class TransitionCallbackReturn(enum.Enum):
    SUCCESS = 1
    FAILURE = 2
    ERROR = 3


class Reliability(enum.Enum):
    BEST_EFFORT = 1
    RELIABLE = 2


class Durability(enum.Enum):
    VOLATILE = 1
    TRANSIENT_LOCAL = 2


class History(enum.Enum):
    KEEP_LAST = 1


@dataclass(frozen=True)
class QoSProfile:
    history: History
    depth: int
    reliability: Reliability
    durability: Durability = Durability.VOLATILE


@dataclass
class Stamp:
    sec: int = 0
    nanosec: int = 0


@dataclass
class Header:
    stamp: Stamp = field(default_factory=Stamp)


@dataclass
class Image:
    header: Header = field(default_factory=Header)
    height: int = 0
    width: int = 0
    encoding: str = "rgb8"
    step: int = 0
    data: bytes = b""


@dataclass
class JointState:
    header: Header = field(default_factory=Header)
    name: list[str] = field(default_factory=list)
    position: list[float] = field(default_factory=list)


@dataclass
class String:
    data: str = ""


@dataclass
class JointTrajectoryPoint:
    positions: list[float] = field(default_factory=list)
    velocities: list[float] = field(default_factory=list)
    time_from_start: Stamp = field(default_factory=Stamp)


@dataclass
class JointTrajectory:
    joint_names: list[str] = field(default_factory=list)
    points: list[JointTrajectoryPoint] = field(default_factory=list)


@dataclass
class Subscription:
    kind: type
    topic: str
    callback: Callable[[Any], None]
    qos: QoSProfile


@dataclass
class Publisher:
    kind: type
    topic: str
    qos: QoSProfile
    enabled: bool = False
    published: list[Any] = field(default_factory=list)

    def publish(self, message: Any) -> None:
        assert type(message) is self.kind
        if self.enabled:  # a lifecycle publisher drops what comes while it is inactive
            self.published.append(message)


# Attributes of rclpy's Node and LifecycleNode: a subclass that sets one breaks them.
TAKEN = [
    "handle",
    "context",
    "clock",
    "logger",
    "parameters",
    "parameter_overrides",
    "parameter_service",
    "descriptors",
    "services",
    "subscriptions",
    "publishers",
    "clients",
    "timers",
    "guards",
    "waitables",
    "callbacks",
    "time_source",
    "rate_group",
    "state_machine",
    "managed_entities",
    "default_callback_group",
    "parameter_event_publisher",
    "parameters_callbacks",
]


class LifecycleNode:
    """State machine, parameters and topics of one node; ``given`` are the parameters of a YAML file."""

    given: ClassVar[dict[str, Any]] = {}

    def __init__(self, node_name: str) -> None:
        self.name, self.state = node_name, "unconfigured"
        self.parameters: dict[str, Any] = {}
        self.subscriptions_: list[Subscription] = []
        self.publishers_: list[Publisher] = []
        self.logged: list[tuple[str, str]] = []
        self.destroyed = False

    def __setattr__(self, name: str, value: Any) -> None:
        assert not (name.startswith("_") and name[1:] in TAKEN), f"rclpy keeps {name} to itself"
        super().__setattr__(name, value)

    def declare_parameter(self, name: str, default: Any) -> None:
        assert name not in self.parameters, f"{name} is declared twice"
        assert default != [], "rclpy cannot tell the type of an empty list"
        value = self.given.get(name, default)
        assert type(value) is type(default), f"{name}: ROS refuses another type"
        self.parameters[name] = value

    def has_parameter(self, name: str) -> bool:
        return name in self.parameters

    def get_parameter(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(value=self.parameters[name])

    def create_subscription(
        self, kind: type, topic: str, callback: Callable[[Any], None], qos: QoSProfile
    ) -> Subscription:
        self.subscriptions_.append(Subscription(kind, topic, callback, qos))
        return self.subscriptions_[-1]

    def create_lifecycle_publisher(self, kind: type, topic: str, qos: QoSProfile) -> Publisher:
        self.publishers_.append(Publisher(kind, topic, qos))
        return self.publishers_[-1]

    def destroy_subscription(self, subscription: Subscription) -> None:
        self.subscriptions_.remove(subscription)

    def destroy_lifecycle_publisher(self, publisher: Publisher) -> None:
        self.publishers_.remove(publisher)

    def get_logger(self) -> SimpleNamespace:
        return SimpleNamespace(
            info=lambda text: self.logged.append(("info", text)),
            error=lambda text: self.logged.append(("error", text)),
        )

    def get_clock(self) -> SimpleNamespace:
        now = SimpleNamespace(nanoseconds=time.time_ns())
        return SimpleNamespace(now=lambda: now)

    def destroy_node(self) -> None:
        self.destroyed = True

    def on_configure(self, state: object) -> TransitionCallbackReturn:
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state: object) -> TransitionCallbackReturn:
        for publisher in self.publishers_:
            publisher.enabled = True
        return TransitionCallbackReturn.SUCCESS

    def on_deactivate(self, state: object) -> TransitionCallbackReturn:
        for publisher in self.publishers_:
            publisher.enabled = False
        return TransitionCallbackReturn.SUCCESS

    on_cleanup = on_shutdown = on_error = on_configure

    def trigger_configure(self) -> TransitionCallbackReturn:
        return self._transition(self.on_configure, ("unconfigured",), "inactive")

    def trigger_activate(self) -> TransitionCallbackReturn:
        return self._transition(self.on_activate, ("inactive",), "active")

    def trigger_deactivate(self) -> TransitionCallbackReturn:
        return self._transition(self.on_deactivate, ("active",), "inactive")

    def trigger_cleanup(self) -> TransitionCallbackReturn:
        return self._transition(self.on_cleanup, ("inactive",), "unconfigured")

    def trigger_shutdown(self) -> TransitionCallbackReturn:
        states = ("unconfigured", "inactive", "active")
        return self._transition(self.on_shutdown, states, "finalized")

    def _transition(
        self, callback: Callable[[object], Any], before: tuple[str, ...], after: str
    ) -> TransitionCallbackReturn:
        assert self.state in before, f"no such transition from {self.state}"
        try:
            result = callback(SimpleNamespace(label=self.state))
        except AssertionError:  # of this stub
            raise
        except Exception:  # rclpy drops it (lifecycle/node.py, __execute_callback)
            self.on_error(SimpleNamespace(label=self.state))
            self.state = "unconfigured"
            return TransitionCallbackReturn.ERROR
        assert isinstance(result, TransitionCallbackReturn)
        if result is TransitionCallbackReturn.SUCCESS:
            self.state = after
        return result


class Executor:
    """Calls ``on_spin`` (set by a test) instead of waiting for messages."""

    on_spin: Callable[[LifecycleNode], None]

    def add_node(self, node: LifecycleNode) -> None:
        self.node = node

    def spin_once(self, timeout_sec: float) -> None:
        type(self).on_spin(self.node)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``import rclpy`` and the message packages find this stub."""
    started: list[bool] = []
    modules = {
        "rclpy": {
            "init": lambda args=None, signal_handler_options=None: started.append(True),
            "ok": lambda: bool(started),
            "try_shutdown": started.clear,
        },
        "rclpy.executors": {"SingleThreadedExecutor": Executor},
        "rclpy.lifecycle": {
            "LifecycleNode": LifecycleNode,
            "LifecycleState": SimpleNamespace,
            "TransitionCallbackReturn": TransitionCallbackReturn,
        },
        "rclpy.qos": {
            "QoSProfile": QoSProfile,
            "ReliabilityPolicy": Reliability,
            "DurabilityPolicy": Durability,
            "HistoryPolicy": History,
        },
        "rclpy.signals": {"SignalHandlerOptions": SimpleNamespace(NO=0)},
        "builtin_interfaces.msg": {"Duration": Stamp},
        "sensor_msgs.msg": {"Image": Image, "JointState": JointState},
        "std_msgs.msg": {"String": String},
        "trajectory_msgs.msg": {
            "JointTrajectory": JointTrajectory,
            "JointTrajectoryPoint": JointTrajectoryPoint,
        },
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        parent = name.partition(".")[0]
        if parent not in modules:
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
