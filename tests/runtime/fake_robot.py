"""A robot and a policy in memory, with faults at chosen ticks, for the control loop's tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from quantvla.runtime.control.clock import VirtualClock
from quantvla.runtime.control.guard import MotionGuard
from quantvla.runtime.control.limits import JointLimits, Limits
from quantvla.runtime.control.loop import ControlLoop, LoopOptions
from quantvla.runtime.control.watchdog import WatchdogOptions
from quantvla.runtime.control.worker import DelayedWorker

RATE_HZ = 10.0
DIM = 2
HORIZON = 8


class FakeRobot:
    """Counts; ``position`` is the last target. ``observe_fault`` and ``act_fault`` get the number of the call."""

    def __init__(
        self,
        clock: VirtualClock | None = None,
        *,
        stamp: Callable[[int, float], float] = lambda call, now_s: now_s,
        observe_fault: Callable[[int], None] = lambda call: None,
        act_fault: Callable[[int], None] = lambda call: None,
    ) -> None:
        self.clock = clock
        self.actions: list[np.ndarray] = []
        self.stops = 0
        self.observed = 0
        self.acts_after_stop = 0
        self._stamp, self._observe_fault, self._act_fault = stamp, observe_fault, act_fault

    @property
    def position(self) -> np.ndarray:
        return self.actions[-1] if self.actions else np.zeros(DIM, np.float32)

    def observe(self) -> Mapping[str, object]:
        call, self.observed = self.observed, self.observed + 1
        self._observe_fault(call)
        obs: dict[str, object] = {"observation.state": self.position.copy(), "task": "go"}
        if self.clock is not None:
            obs["timestamp"] = self._stamp(call, self.clock.now())
        return obs

    def act(self, action: np.ndarray) -> None:
        self._act_fault(len(self.actions))
        self.acts_after_stop += self.stops > 0
        self.actions.append(action.copy())

    def stop(self) -> None:
        self.stops += 1


class RampPolicy:
    """Row i of a chunk is the measured position plus ``step`` times i + 1."""

    def __init__(self, step: float = 0.1, fault: Callable[[int], Any] = lambda call: None) -> None:
        self.calls = 0
        self.step, self._fault = step, fault

    def predict_action_chunk(
        self, obs: Mapping[str, Any], /, *, seed: int | None = None
    ) -> np.ndarray:
        call, self.calls = self.calls, self.calls + 1
        replaced = self._fault(call)
        rows = np.arange(1, HORIZON + 1, dtype=np.float32)[:, None] * np.float32(self.step)
        chunk = np.asarray(obs["observation.state"]) + np.repeat(rows, DIM, axis=1)
        return chunk.astype(np.float32) if replaced is None else replaced


def make_limits(**fields: Any) -> Limits:
    return Limits(tuple(JointLimits(name=f"j{i}", **fields) for i in range(DIM)), "test")


def make_loop(
    strategy: Any,
    robot: FakeRobot,
    *,
    delay_ticks: int = 0,
    limits: Limits | None = None,
    guard: MotionGuard | None = None,
    **options: Any,
) -> ControlLoop:
    """A loop in virtual time: the same every time, and as fast as the machine."""
    return ControlLoop(
        robot,
        strategy,
        rate_hz=RATE_HZ,
        guard=guard or MotionGuard(limits or make_limits(), RATE_HZ),
        clock=robot.clock or VirtualClock(),
        worker=lambda s: DelayedWorker(s.predict, delay_ticks),
        options=options.pop("options", LoopOptions(max_age_s=0.25)),
        watchdog=options.pop("watchdog", WatchdogOptions(hold_s=1.0)),
        **options,
    )
