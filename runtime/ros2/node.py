"""The node: image, joint state and instruction topics in, JointTrajectory out, guarded, with a lifecycle.

    python3 -m quantvla.runtime.ros2.node --ros-args --params-file robot.yaml

Written against rclpy's lifecycle API; tested with a stub of the calls made here, not yet on a ROS
installation.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import rclpy
from builtin_interfaces.msg import Duration
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.manifest import read_manifest
from quantvla.runtime.ros2.drive import Drive
from quantvla.runtime.ros2.messages import Time, capture_time
from quantvla.runtime.ros2.robot import Command
from quantvla.runtime.ros2.settings import (
    Parameters,
    Wiring,
    defaults,
    image_parameter,
    read_parameters,
    wire,
)

_NEWEST = {"history": HistoryPolicy.KEEP_LAST, "depth": 1}
# A lost frame is made up for by the next; a lost command is not, and a late subscriber needs the task.
SENSOR_QOS = QoSProfile(reliability=ReliabilityPolicy.BEST_EFFORT, **_NEWEST)
COMMAND_QOS = QoSProfile(reliability=ReliabilityPolicy.RELIABLE, **_NEWEST)
TASK_QOS = QoSProfile(
    reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL, **_NEWEST
)


class PolicyNode(LifecycleNode):  # type: ignore[misc]
    """configure: load the engine, subscribe; activate: run the control loop; deactivate: stop the robot.

    A loop that ends by itself (guard, watchdog, a failing engine) has stopped the robot and said
    why in the log; deactivate and activate to go on. Attributes begin with ``quantvla_``: rclpy's
    classes keep names such as ``_parameters`` to themselves.
    """

    def __init__(self) -> None:
        super().__init__("quantvla")
        for name, default in defaults().items():
            self.declare_parameter(name, default)
        self.quantvla_drive: Drive | None = None
        self.quantvla_inputs: list[Any] = []
        self.quantvla_output: Any = None
        self.quantvla_joints: list[str] = []

    @property
    def autostart(self) -> bool:
        """Whether to configure and activate without a lifecycle manager."""
        return bool(self.get_parameter("autostart").value)

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load and warm up the engine, subscribe, and announce the trajectory; bad parameters fail."""
        try:
            with self._telling():
                self._set_up()
        except QuantVLAError:
            return TransitionCallbackReturn.FAILURE
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Run the loop, now that the trajectory can be published."""
        result = super().on_activate(state)
        if result == TransitionCallbackReturn.SUCCESS and self.quantvla_drive is not None:
            with self._telling():
                self.quantvla_drive.start()
        return result

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """End the loop, which stops the robot, while the trajectory can still be published."""
        if self.quantvla_drive is not None:
            with self._telling():
                self.quantvla_drive.stop()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free the engine and the topics."""
        self._release()
        return super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop the robot and free everything, from whatever state."""
        self._release()
        return super().on_shutdown(state)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop the robot after a transition that failed unexpectedly."""
        self._tell("a transition failed", True)
        self._release()
        return super().on_error(state)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Log what is raised inside: rclpy makes an ERROR of it and drops the words."""
        try:
            yield
        except Exception as error:
            kind = "" if isinstance(error, QuantVLAError) else f"{type(error).__name__}: "
            self._tell(f"{kind}{error}", True)
            raise

    def _set_up(self) -> None:
        parameters = read_parameters({n: self.get_parameter(n).value for n in defaults()})
        manifest = read_manifest(Path(parameters.engine))
        topics = {c.key: self._topic(image_parameter(c.key)) for c in manifest.cameras}
        wiring = wire(parameters, topics, manifest)
        self.quantvla_joints = list(wiring.command_joints)
        drive = Drive(parameters, manifest, wiring, self._publish, self._tell)
        self.quantvla_drive = drive
        self._connect(parameters, wiring, drive)

    def _topic(self, parameter: str) -> str:
        if not self.has_parameter(parameter):
            self.declare_parameter(parameter, "")
        return str(self.get_parameter(parameter).value)

    def _connect(self, parameters: Parameters, wiring: Wiring, drive: Drive) -> None:
        self.quantvla_output = self.create_lifecycle_publisher(
            JointTrajectory, parameters.trajectory_topic, COMMAND_QOS
        )
        robot = drive.robot

        def on_image(key: str, message: Image) -> None:
            robot.receive_image(key, message, self._captured_s(message.header.stamp))

        def on_joints(message: JointState) -> None:
            robot.receive_joints(message, self._captured_s(message.header.stamp))

        def on_task(message: String) -> None:
            robot.receive_task(message.data)

        inputs: list[tuple[Any, str, Callable[[Any], None], QoSProfile]] = [
            (Image, topic, partial(on_image, key), SENSOR_QOS)
            for key, topic in wiring.image_topics.items()
        ]
        inputs.append((JointState, parameters.joint_states_topic, on_joints, SENSOR_QOS))
        inputs.append((String, parameters.instruction_topic, on_task, TASK_QOS))
        self.quantvla_inputs = [self.create_subscription(*each) for each in inputs]

    def _release(self) -> None:
        if self.quantvla_drive is not None:
            self.quantvla_drive.close()
            self.quantvla_drive = None
        for subscription in self.quantvla_inputs:
            self.destroy_subscription(subscription)
        self.quantvla_inputs = []
        if self.quantvla_output is not None:
            self.destroy_lifecycle_publisher(self.quantvla_output)
            self.quantvla_output = None

    def _tell(self, text: str, failed: bool) -> None:
        log = self.get_logger()
        (log.error if failed else log.info)(text)

    def _captured_s(self, stamp: Time) -> float:
        ros_now_s = self.get_clock().now().nanoseconds * 1e-9
        return capture_time(stamp, ros_now_s=ros_now_s, now_s=time.monotonic())

    def _publish(self, command: Command) -> None:
        point = JointTrajectoryPoint()
        point.positions = list(command.positions)
        point.velocities = list(command.velocities or ())
        seconds, nanoseconds = divmod(round(command.seconds * 1e9), 10**9)
        point.time_from_start = Duration(sec=seconds, nanosec=nanoseconds)
        trajectory = JointTrajectory()  # a stamp of zero: start at once
        trajectory.joint_names = self.quantvla_joints
        trajectory.points = [point]
        self.quantvla_output.publish(trajectory)


def main(args: list[str] | None = None) -> None:
    """Run the node until SIGINT or SIGTERM; the robot is stopped while its topic still exists.

    rclpy's own signal handlers would close the topics first.
    """
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    ending = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ending.set())
    node = PolicyNode()
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        if node.autostart and node.trigger_configure() == TransitionCallbackReturn.SUCCESS:
            node.trigger_activate()
        while rclpy.ok() and not ending.is_set():
            executor.spin_once(timeout_sec=0.1)
    finally:
        node.trigger_shutdown()
        node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    main()
