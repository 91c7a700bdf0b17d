"""An engine and a control loop for one robot behind ROS topics, without rclpy."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from quantvla.runtime.control.guard import MotionGuard
from quantvla.runtime.control.limits import Limits, limits_from_manifest, read_limits
from quantvla.runtime.control.loop import ControlLoop, LoopOptions
from quantvla.runtime.control.spec import StrategySpec, build_strategy
from quantvla.runtime.manifest import Manifest
from quantvla.runtime.policy import Policy
from quantvla.runtime.ros2.robot import Command, RosRobot
from quantvla.runtime.ros2.settings import Parameters, Wiring

_JOIN_S = 10.0
_WARM_UP_RUNS = 2


class Drive:
    """Loads an engine and runs the loop between `start` and `stop`, any number of times.

    ``send`` publishes a command; ``tell(text, failed)`` writes the log. Raises `QuantVLAError` for
    whatever does not fit together, before the robot is live.
    """

    def __init__(
        self,
        parameters: Parameters,
        manifest: Manifest,
        wiring: Wiring,
        send: Callable[[Command], None],
        tell: Callable[[str, bool], None],
    ) -> None:
        self.robot = RosRobot(
            manifest, wiring, send, rate_hz=parameters.rate_hz, task=parameters.task
        )
        self._parameters, self._tell = parameters, tell
        self._limits = _limits(parameters, manifest)
        self.policy = Policy.from_pretrained(parameters.engine, threads=parameters.threads or None)
        spec = StrategySpec(kind=parameters.strategy, execute=parameters.execute or None)
        self._strategy = build_strategy(spec, self.policy)
        self.policy.warm_up(_WARM_UP_RUNS)
        self._running: tuple[ControlLoop, threading.Thread] | None = None
        tell(f"guard: {parameters.guard_mode}, limits from {self._limits.source}", False)

    @property
    def running(self) -> bool:
        """Whether a loop is moving the robot now."""
        return self._running is not None and self._running[1].is_alive()

    def start(self) -> None:
        """Run a new loop in a thread of its own."""
        parameters = self._parameters
        loop = ControlLoop(
            self.robot,
            self._strategy,
            rate_hz=parameters.rate_hz,
            guard=MotionGuard(self._limits, parameters.rate_hz, mode=parameters.guard_mode),
            options=LoopOptions(
                max_age_s=parameters.max_age_s, state_key=self.policy.manifest.state.key
            ),
        )
        thread = threading.Thread(target=self._run, args=(loop,), name="control", daemon=True)
        self._running = (loop, thread)
        thread.start()

    def stop(self) -> None:
        """End the loop, which stops the robot; a loop that does not end is passed over."""
        if self._running is None:
            return
        loop, thread = self._running
        loop.stop("deactivated")
        thread.join(_JOIN_S)
        if thread.is_alive():
            self._tell("the control loop does not end; stopping the robot beside it", True)
            self.robot.stop()
        self._running = None

    def close(self) -> None:
        """Stop, and free the engine."""
        self.stop()
        self.policy.close()

    def _run(self, loop: ControlLoop) -> None:
        try:
            report = loop.run()
        except Exception as error:  # the loop has stopped the robot; the log must say so
            self._tell(f"control loop failed: {type(error).__name__}: {error}", True)
        else:
            self._tell(f"stopped: {report.stop_cause}", report.failed)


def _limits(parameters: Parameters, manifest: Manifest) -> Limits:
    if parameters.limits_file:
        return read_limits(Path(parameters.limits_file), manifest.action)
    return limits_from_manifest(manifest)
