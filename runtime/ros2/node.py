"""The node: image, joint state and instruction topics in, JointTrajectory out, guarded, with a lifecycle.

    python3 -m quantvla.runtime.ros2.node --ros-args --params-file robot.yaml

Written against rclpy's lifecycle API; tested with a stub of the calls made here, not yet on a ROS
installation.
"""

from __future__ import annotations

import signal
import threading
import time
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

from quantvla.runtime.control.guard import MotionGuard
from quantvla.runtime.control.limits import limits_from_manifest, read_limits
from quantvla.runtime.control.loop import ControlLoop, LoopOptions
from quantvla.runtime.control.spec import StrategySpec, build_strategy
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.manifest import read_manifest
from quantvla.runtime.policy import Policy
from quantvla.runtime.ros2.messages import Time, capture_time
from quantvla.runtime.ros2.robot import Command, RosRobot
from quantvla.runtime.ros2.settings import (
    Parameters,
    Wiring,
    defaults,
    image_parameter,
    read_parameters,
    wire,
)

_JOIN_S = 10.0
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
    why in the log; deactivate and activate to go on.
    """

    def __init__(self) -> None:
        super().__init__("quantvla")
        for name, default in defaults().items():
            self.declare_parameter(name, default)
        self._policy: Policy | None = None
        self._subscriptions_made: list[Any] = []
        self._publisher: Any = None
        self._loop: ControlLoop | None = None
        self._thread: threading.Thread | None = None

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load and warm up the engine, subscribe, and announce the trajectory; bad parameters fail."""
        try:
            self._configure()
        except QuantVLAError as error:
            self.get_logger().error(str(error))
            self._release()
            return TransitionCallbackReturn.FAILURE
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Run the loop in a thread of its own."""
        result = super().on_activate(state)
        if result == TransitionCallbackReturn.SUCCESS:
            self._loop = self._make_loop()
            self._thread = threading.Thread(target=self._run, args=(self._loop,), daemon=True)
            self._thread.start()
        return result

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """End the loop, which stops the robot, while the trajectory can still be published."""
        self._halt()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free the engine and the topics."""
        self._release()
        return super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop the robot and free everything, from whatever state."""
        self._halt()
        self._release()
        return super().on_shutdown(state)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop the robot after a transition that failed unexpectedly."""
        self._halt()
        self._release()
        return super().on_error(state)

    @property
    def autostart(self) -> bool:
        """Whether to configure and activate without a lifecycle manager."""
        return bool(self.get_parameter("autostart").value)

    def _configure(self) -> None:
        parameters = read_parameters({n: self.get_parameter(n).value for n in defaults()})
        manifest = read_manifest(Path(parameters.engine))
        topics = {c.key: self._declared(image_parameter(c.key)) for c in manifest.cameras}
        wiring = wire(parameters, topics, manifest)
        self._policy = Policy.from_pretrained(parameters.engine, threads=parameters.threads or None)
        self._policy.warm_up(2)
        self._parameters = parameters
        self._make_loop_parts(parameters)
        self._command_joints = list(wiring.command_joints)
        self._robot = RosRobot(
            manifest, wiring, self._publish, rate_hz=parameters.rate_hz, task=parameters.task
        )
        self._connect(parameters, wiring)

    def _declared(self, name: str) -> str:
        if not self.has_parameter(name):
            self.declare_parameter(name, "")
        return str(self.get_parameter(name).value)

    def _make_loop_parts(self, parameters: Parameters) -> None:
        """Find limits and strategy now, so that what does not fit is said before the robot is live."""
        assert self._policy is not None
        manifest = self._policy.manifest
        self._limits = (
            read_limits(Path(parameters.limits_file), manifest.action)
            if parameters.limits_file
            else limits_from_manifest(manifest)
        )
        spec = StrategySpec(kind=parameters.strategy, execute=parameters.execute or None)
        self._strategy = build_strategy(spec, self._policy)
        self.get_logger().info(f"guard: {parameters.guard_mode}, limits from {self._limits.source}")

    def _make_loop(self) -> ControlLoop:
        assert self._policy is not None
        parameters = self._parameters
        return ControlLoop(
            self._robot,
            self._strategy,
            rate_hz=parameters.rate_hz,
            guard=MotionGuard(self._limits, parameters.rate_hz, mode=parameters.guard_mode),
            options=LoopOptions(
                max_age_s=parameters.max_age_s, state_key=self._policy.manifest.state.key
            ),
        )

    def _connect(self, parameters: Parameters, wiring: Wiring) -> None:
        self._publisher = self.create_lifecycle_publisher(
            JointTrajectory, parameters.trajectory_topic, COMMAND_QOS
        )
        made = self._subscriptions_made
        for key, topic in wiring.image_topics.items():
            made.append(
                self.create_subscription(Image, topic, partial(self._on_image, key), SENSOR_QOS)
            )
        made.append(
            self.create_subscription(
                JointState, parameters.joint_states_topic, self._on_joints, SENSOR_QOS
            )
        )
        made.append(
            self.create_subscription(String, parameters.instruction_topic, self._on_task, TASK_QOS)
        )

    def _run(self, loop: ControlLoop) -> None:
        try:
            report = loop.run()
        except Exception as error:  # the loop has stopped the robot; the node must say so
            self.get_logger().error(f"control loop failed: {type(error).__name__}: {error}")
            return
        log = self.get_logger().error if report.failed else self.get_logger().info
        log(f"stopped: {report.stop_cause}")

    def _halt(self) -> None:
        if self._loop is not None and self._thread is not None:
            self._loop.stop("deactivated")
            self._thread.join(_JOIN_S)
            if self._thread.is_alive():
                self.get_logger().error("the control loop does not end; stopping the robot anyway")
                self._robot.stop()
        self._loop = self._thread = None

    def _release(self) -> None:
        for subscription in self._subscriptions_made:
            self.destroy_subscription(subscription)
        self._subscriptions_made.clear()
        if self._publisher is not None:
            self.destroy_lifecycle_publisher(self._publisher)
            self._publisher = None
        if self._policy is not None:
            self._policy.close()
            self._policy = None

    def _captured_s(self, stamp: Time) -> float:
        ros_now_s = self.get_clock().now().nanoseconds * 1e-9
        return capture_time(stamp, ros_now_s=ros_now_s, now_s=time.monotonic())

    def _on_image(self, key: str, message: Image) -> None:
        self._robot.receive_image(key, message, self._captured_s(message.header.stamp))

    def _on_joints(self, message: JointState) -> None:
        self._robot.receive_joints(message, self._captured_s(message.header.stamp))

    def _on_task(self, message: String) -> None:
        self._robot.receive_task(message.data)

    def _publish(self, command: Command) -> None:
        point = JointTrajectoryPoint()
        point.positions = list(command.positions)
        point.velocities = list(command.velocities or ())
        seconds = int(command.seconds)
        nanoseconds = round((command.seconds - seconds) * 1e9)
        point.time_from_start = Duration(sec=seconds, nanosec=nanoseconds)
        trajectory = JointTrajectory()  # a stamp of zero: start at once
        trajectory.joint_names = self._command_joints
        trajectory.points = [point]
        self._publisher.publish(trajectory)


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
