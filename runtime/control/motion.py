"""Commands within bounds of position, velocity, acceleration and jerk, one tick at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.control.limits import Limits

Vector = NDArray[np.float64]
Quantity = Literal["position", "velocity", "acceleration", "jerk"]
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Motion:
    """A command (dim,) with its velocity and acceleration (dim,) as finite differences."""

    command: Vector
    velocity: Vector
    acceleration: Vector


class MotionLimiter:
    """Finds the command nearest to a wanted one whose differences stay within the limits.

    The velocity of a target is its change since the last command, that of a ``relative`` command
    the command itself, both per second. Where bounds exclude each other position goes before
    velocity, velocity before acceleration, acceleration before jerk. A target with a position and
    an acceleration bound is slowed down early enough to come to rest at the bound.
    """

    def __init__(self, limits: Limits, period_s: float) -> None:
        self._period_s = period_s
        self._relative = limits.relative
        self._states = [joint.state for joint in limits.joints]
        self._lower, self._upper = limits.bound("lower", -np.inf), limits.bound("upper", np.inf)
        self._velocity = limits.bound("velocity", np.inf)
        self._acceleration = limits.bound("acceleration", np.inf)
        self._jerk = limits.bound("jerk", np.inf)
        self._brakes = ~self._relative & np.isfinite(self._acceleration)
        self._reference: Vector = np.full(limits.dim, np.nan)
        self._motion: Motion | None = None

    @property
    def started(self) -> bool:
        """Whether a command was sent."""
        return self._motion is not None

    @property
    def last(self) -> Vector | None:
        """The last command (dim,), None before the first."""
        return None if self._motion is None else self._motion.command

    def start_at(self, state: NDArray[np.floating]) -> None:
        """Take measured positions as reference of the first command, for joints that say where they are."""
        for index, entry in enumerate(self._states):
            if entry is not None and entry < len(state) and not self._relative[index]:
                self._reference[index] = state[entry]

    def limit(
        self, wanted: Vector, ticks: int = 1
    ) -> tuple[Motion, dict[Quantity, NDArray[np.bool_]]]:
        """Return the nearest admissible motion, and for each quantity the entries that would exceed it."""
        dt = ticks * self._period_s
        last, velocity, acceleration = self._before(wanted)
        rate = self._rate(wanted, last, dt)
        low, high = np.full(rate.shape, -np.inf), np.full(rate.shape, np.inf)
        violated: dict[Quantity, NDArray[np.bool_]] = {}
        bounds = self._bounds(last, velocity, acceleration, dt)
        for quantity, (least, most) in bounds.items():
            slack = _TOLERANCE * (1.0 + np.abs(rate))
            violated[quantity] = (rate < least - slack) | (rate > most + slack)
            low, high = np.clip(least, low, high), np.clip(most, low, high)
        limited = np.clip(rate, low, high)
        command = np.where(limited == rate, wanted, self._command(limited, last, dt))
        return Motion(command, limited, (limited - velocity) / dt), violated

    def hold(self, ticks: int = 1) -> Motion:
        """Return the motion that comes to rest, within the bounds of acceleration and jerk."""
        assert self._motion is not None
        at_rest = np.where(self._relative, 0.0, self._motion.command)
        return self.limit(at_rest, ticks)[0]

    def commit(self, motion: Motion) -> None:
        """Note the motion as sent."""
        self._motion = motion

    def _before(self, wanted: Vector) -> tuple[Vector, Vector, Vector]:
        """Return last command, velocity and acceleration; a first command without reference comes from rest there."""
        if self._motion is not None:
            return self._motion.command, self._motion.velocity, self._motion.acceleration
        inside = np.clip(wanted, self._lower, self._upper)
        start = np.where(np.isnan(self._reference), inside, self._reference)
        return start, np.zeros_like(start), np.zeros_like(start)

    def _rate(self, command: Vector, last: Vector, dt: float) -> Vector:
        rate: Vector = np.where(self._relative, command, command - last) / dt
        return rate

    def _command(self, rate: Vector, last: Vector, dt: float) -> Vector:
        origin = np.where(self._relative, 0.0, last)
        command: Vector = rate * dt + origin  # rounding must not carry it over a bound
        return np.clip(command, np.minimum(self._lower, origin), np.maximum(self._upper, origin))

    def _bounds(
        self, last: Vector, velocity: Vector, acceleration: Vector, dt: float
    ) -> dict[Quantity, tuple[Vector, Vector]]:
        """Return the interval of rates that each quantity admits, in the order in which they bind."""
        origin = np.where(self._relative, 0.0, last)
        below, above = origin - self._lower, self._upper - origin
        change = self._acceleration * dt
        bend = acceleration * dt
        return {
            "position": (-self._approach(below, dt), self._approach(above, dt)),
            "velocity": (-self._velocity, self._velocity),
            "acceleration": (velocity - change, velocity + change),
            "jerk": (
                velocity + bend - self._jerk * dt * dt,
                velocity + bend + self._jerk * dt * dt,
            ),
        }

    def _approach(self, distance: Vector, dt: float) -> Vector:
        """Return the largest rate towards a bound at ``distance`` from which one can still come to rest before it.

        One tick at rate r and then braking at a takes ``r dt + r^2 / (2 a)``. A robot that is
        outside its bound may only move back, as fast as the policy wants and the other bounds let it.
        """
        rate = np.maximum(distance, 0.0) / dt
        brakes = self._brakes & (distance > 0) & np.isfinite(distance)
        a = np.where(brakes, self._acceleration, 1.0)
        room = np.where(brakes, distance, 1.0)
        slow = -a * dt + np.sqrt((a * dt) ** 2 + 2 * a * room)
        return np.where(brakes, np.minimum(slow, rate), rate)
