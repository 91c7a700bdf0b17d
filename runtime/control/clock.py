"""Time for the control loop: the machine's monotonic clock, or a clock that only moves when slept on."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds that never go backwards."""

    def now(self) -> float:
        """Return the present time."""
        ...

    def sleep_until(self, deadline_s: float) -> None:
        """Return at ``deadline_s``, at once if that has passed."""
        ...


class MonotonicClock:
    """`time.monotonic`, which adjustments of the wall clock do not move."""

    def now(self) -> float:
        """Return the present time."""
        return time.monotonic()

    def sleep_until(self, deadline_s: float) -> None:
        """Return at ``deadline_s``, at once if that has passed."""
        remaining_s = deadline_s - time.monotonic()
        if remaining_s > 0:
            time.sleep(remaining_s)


class VirtualClock:
    """Time that passes only by sleeping: a simulator runs as fast as it can and always alike."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def now(self) -> float:
        """Return the present time."""
        return self._now_s

    def sleep_until(self, deadline_s: float) -> None:
        """Move to ``deadline_s`` unless that has passed."""
        self._now_s = max(self._now_s, deadline_s)
