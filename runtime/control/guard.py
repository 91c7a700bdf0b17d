"""The last check between a policy and the motors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.control.limits import Limits
from quantvla.runtime.control.motion import Motion, MotionLimiter
from quantvla.runtime.errors import explain

FloatArray = NDArray[np.float32]
Vector = NDArray[np.float64]
Mode = Literal["clamp", "hold", "stop"]
Cause = Literal[
    "not finite", "stale observation", "position", "velocity", "acceleration", "jerk", "seam"
]
MODES: tuple[Mode, ...] = ("clamp", "hold", "stop")


@dataclass(frozen=True)
class Intervention:
    """One reason why an action was not sent as it was: joints concerned, wanted and sent values."""

    tick: int
    cause: Cause
    joints: tuple[str, ...]
    wanted: tuple[float, ...]
    sent: tuple[float, ...]

    def __str__(self) -> str:
        """Return it as one line of a log."""
        moved = ", ".join(
            f"{name} {wanted:.6g} -> {sent:.6g}"
            for name, wanted, sent in zip(self.joints, self.wanted, self.sent, strict=True)
        )
        return f"tick {self.tick}: {self.cause}: {moved or 'held'}"


@dataclass(frozen=True)
class Verdict:
    """What to send: ``action`` (dim,), None to send nothing. ``stop`` says why the robot must stop now."""

    action: FloatArray | None
    interventions: tuple[Intervention, ...] = ()
    stop: str | None = None


class MotionGuard:
    """Checks every action before it is sent, and makes the commands that hold the robot.

    ``clamp`` sends the nearest action within the limits, ``hold`` holds instead, ``stop`` stops.
    An action that is not finite or rests on a stale observation cannot be clamped: it is held.
    ``kill_after`` ticks in a row with an intervention stop the robot in any mode.

    To hold is to repeat the last target; a ``relative`` command becomes zero. Where acceleration
    or jerk are bounded, a moving robot is slowed down within them. Before the first action there
    is nothing to hold, and nothing is sent.
    """

    def __init__(
        self, limits: Limits, rate_hz: float, *, mode: Mode = "clamp", kill_after: int | None = 100
    ) -> None:
        if mode not in MODES:
            raise explain(
                "guard mode", "unknown", got=repr(mode), remedy=f"known: {', '.join(MODES)}"
            )
        self.limits, self.mode, self.kill_after = limits, mode, kill_after
        self.counts: Counter[Cause] = Counter()
        self._names = tuple(joint.name for joint in limits.joints)
        self._limiter = MotionLimiter(limits, 1.0 / rate_hz)
        self._seam = limits.bound("seam", np.inf)
        self._offset: Vector = np.zeros(limits.dim)
        self._in_a_row = 0

    def start_at(self, state: NDArray[np.floating]) -> None:
        """Take the measured pose as the reference for the first command, where limits name its entries."""
        self._limiter.start_at(state)

    def admit(
        self, action: FloatArray, *, tick: int, seam: bool, stale: bool = False, ticks: int = 1
    ) -> Verdict:
        """Return what to send for ``action`` (dim,).

        ``seam``: it is the first of another chunk; ``stale``: there is no fresh observation;
        ``ticks``: how many passed since the last command.
        """
        if action.shape != (self.limits.dim,):
            raise explain(
                "action",
                f"expected {self.limits.dim} numbers as in {self.limits.source}",
                got=f"shape {action.shape}",
                remedy="use the limits of this policy",
            )
        if not np.isfinite(action).all():
            return self._reject("not finite", ~np.isfinite(action), action, tick, ticks)
        if stale:
            return self._reject(
                "stale observation", np.zeros(action.shape, np.bool_), action, tick, ticks
            )
        wanted = self._slewed(action.astype(np.float64), seam)
        motion, violated = self._limiter.limit(wanted.command, ticks)
        found: list[tuple[Cause, NDArray[np.bool_]]] = [("seam", wanted.jumps), *violated.items()]
        causes = {cause: where for cause, where in found if where.any()}
        if causes and self.mode != "clamp":
            return self._verdict(self._limiter.hold(ticks), causes, action, tick)
        return self._verdict(motion, causes, action, tick)

    def hold(self, ticks: int = 1) -> FloatArray | None:
        """Return the command that keeps the robot where it is, None before the first action."""
        self._offset[:] = 0.0
        if not self._limiter.started:
            return None
        motion = self._limiter.hold(ticks)
        self._limiter.commit(motion)
        return motion.command.astype(np.float32)

    def _reject(
        self, cause: Cause, where: NDArray[np.bool_], action: FloatArray, tick: int, ticks: int
    ) -> Verdict:
        self._offset[:] = 0.0
        motion = self._limiter.hold(ticks) if self._limiter.started else None
        return self._verdict(motion, {cause: where}, action, tick)

    def _slewed(self, action: Vector, seam: bool) -> _Slewed:
        """Spread a jump at a chunk's seam over the following ticks, ``seam`` per tick."""
        jumps = np.zeros(action.shape, np.bool_)
        last = self._limiter.last
        if seam and last is not None:
            jump = action - last
            jumps = np.abs(jump) > self._seam
            self._offset = np.where(jumps, -jump, 0.0)
        if not self._offset.any():
            return _Slewed(action, jumps)
        size = np.maximum(np.abs(self._offset) - self._seam, 0.0)
        self._offset = np.copysign(size, self._offset)
        return _Slewed(action + self._offset, jumps)

    def _verdict(
        self,
        motion: Motion | None,
        causes: dict[Cause, NDArray[np.bool_]],
        action: FloatArray,
        tick: int,
    ) -> Verdict:
        """Note the command as sent and return it with what was changed."""
        sent = None
        if motion is not None:
            self._limiter.commit(motion)
            sent = motion.command.astype(np.float32)
        self._in_a_row = self._in_a_row + 1 if causes else 0
        interventions = tuple(self._describe(causes, action, sent, tick))
        self.counts.update(causes.keys())
        return Verdict(sent, interventions, self._stop(causes))

    def _describe(
        self,
        causes: dict[Cause, NDArray[np.bool_]],
        action: FloatArray,
        sent: FloatArray | None,
        tick: int,
    ) -> Iterable[Intervention]:
        nowhere = np.full(action.shape, np.nan)
        for cause, where in causes.items():
            at = np.flatnonzero(where)
            yield Intervention(
                tick,
                cause,
                tuple(self._names[i] for i in at),
                tuple(action[at].tolist()),
                tuple((nowhere if sent is None else sent)[at].tolist()),
            )

    def _stop(self, causes: dict[Cause, NDArray[np.bool_]]) -> str | None:
        if causes and self.mode == "stop":
            return f"motion guard: {', '.join(causes)}"
        if self.kill_after is not None and self._in_a_row >= self.kill_after:
            return (
                f"motion guard: {self._in_a_row} interventions in a row, last {', '.join(causes)}"
            )
        return None


@dataclass(frozen=True)
class _Slewed:
    command: Vector
    jumps: NDArray[np.bool_]
