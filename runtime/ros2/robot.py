"""A robot behind ROS topics, as the control loop wants it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.control.robot import TIMESTAMP_KEY
from quantvla.runtime.errors import explain
from quantvla.runtime.manifest import Manifest
from quantvla.runtime.preprocess import Observation
from quantvla.runtime.ros2.messages import (
    ImageMessage,
    JointStateMessage,
    image_pixels,
    joint_positions,
)
from quantvla.runtime.ros2.settings import Wiring

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Command:
    """Target positions in ROS units for all command joints, to be reached after ``seconds``.

    ``velocities`` are zero for a last target, None on the way.
    """

    positions: tuple[float, ...]
    seconds: float
    velocities: tuple[float, ...] | None = None


@dataclass(frozen=True)
class _Received:
    value: NDArray[Any]
    captured_s: float


class RosRobot:
    """Keeps the newest message of every topic; `Robot` for `ControlLoop`.

    The ``receive_*`` methods are called from the node's executor, the others from the loop. An
    action becomes one `Command` for ``send``, to be reached one period later.
    """

    def __init__(
        self,
        manifest: Manifest,
        wiring: Wiring,
        send: Callable[[Command], None],
        *,
        rate_hz: float,
        task: str,
    ) -> None:
        self._manifest, self._wiring, self._send = manifest, wiring, send
        self._period_s = 1.0 / rate_hz
        self._lock = threading.Lock()
        self._images: dict[str, _Received | Exception] = {}
        self._state: _Received | Exception | None = None
        self._task = task
        self._last: tuple[float, ...] | None = None

    def receive_image(self, key: str, message: ImageMessage, captured_s: float) -> None:
        """Take a camera's new image; a bad one is reported by the next `observe`."""
        received: _Received | Exception
        try:
            received = _Received(image_pixels(message, key), captured_s)
        except Exception as error:  # a message may hold anything; the loop must hear of it
            received = error
        with self._lock:
            self._images[key] = received

    def receive_joints(self, message: JointStateMessage, captured_s: float) -> None:
        """Take the joints' new positions; a bad message is reported by the next `observe`."""
        received: _Received | Exception
        try:
            positions = joint_positions(message, self._wiring.state_joints)
            received = _Received(positions * self._wiring.state_scale, captured_s)
        except Exception as error:
            received = error
        with self._lock:
            self._state = received

    def receive_task(self, text: str) -> None:
        """Take a new instruction."""
        with self._lock:
            self._task = text

    def observe(self) -> Observation:
        """Return the newest of everything, as old as its oldest part; raises while something is missing."""
        with self._lock:
            parts = {key: self._images.get(key) for key in self._wiring.image_topics}
            parts[self._manifest.state.key] = self._state
            task = self._task
        observation: dict[str, object] = {}
        times = []
        for key, part in parts.items():
            if part is None:
                raise explain(f"observation {key!r}", "nothing received", remedy="check its topic")
            if isinstance(part, Exception):
                raise part
            observation[key] = part.value
            times.append(part.captured_s)
        if not task:
            raise explain("instruction", "none received", remedy="publish one or set 'task'")
        return {**observation, self._manifest.task_key: task, TIMESTAMP_KEY: min(times)}

    def act(self, action: FloatArray) -> None:
        """Send one action, policy units, as the target of the next period."""
        positions = tuple((action.astype(np.float64) / self._wiring.command_scale).tolist())
        self._send(Command(positions, self._period_s))
        self._last = positions

    def stop(self) -> None:
        """Send the last target again with zero velocity, so that the arm comes to rest there."""
        if self._last is not None:
            still = (0.0,) * len(self._last)
            self._send(Command(self._last, self._period_s, velocities=still))
