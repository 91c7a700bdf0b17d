"""How many ticks an inference takes, as measured lately."""

from __future__ import annotations

from collections import deque


class DelayEstimate:
    """The largest of the last ``window`` delays: a chunk that comes later than assumed meets a plan
    that has moved on, while one that comes earlier only fits less tightly.

    A delay counts the ticks that the robot runs between the one a chunk is asked for and the one
    it is there at: 0 when it is there in time. Warm-up runs are not added: a first run is several
    times slower.
    """

    def __init__(self, window: int = 10) -> None:
        self._delays: deque[int] = deque(maxlen=window)

    def add(self, ticks: int) -> None:
        """Note one measured delay."""
        self._delays.append(ticks)

    @property
    def ticks(self) -> int:
        """The estimate; 0 before the first measurement."""
        return max(self._delays, default=0)
