"""Whether the latest observation may be acted on."""

from __future__ import annotations

from quantvla.runtime.control.robot import TIMESTAMP_KEY
from quantvla.runtime.preprocess import Observation

_FUTURE_S = 0.05


class ObservationFeed:
    """Keeps the newest observation that was captured after the one before it, and knows its age."""

    def __init__(self, max_age_s: float) -> None:
        self._max_age_s = max_age_s
        self._captured_s: float | None = None
        self.latest: Observation | None = None

    def accept(self, observation: Observation | None, now_s: float) -> str | None:
        """Take what the robot gave at ``now_s``; returns what is wrong with it, None if it is fit for use."""
        if observation is None:
            return "no observation"
        stamp = observation.get(TIMESTAMP_KEY, now_s)
        if not isinstance(stamp, float | int) or stamp != stamp:
            return f"timestamp is not a number of seconds: {stamp!r}"
        if stamp > now_s + _FUTURE_S:
            return f"captured {stamp - now_s:.3f} s in the future of time.monotonic"
        if self._captured_s is not None and stamp < self._captured_s:
            return f"clock went backwards by {self._captured_s - stamp:.3f} s"
        self._captured_s, self.latest = float(stamp), observation
        if now_s - stamp > self._max_age_s:
            return f"captured {now_s - stamp:.3f} s ago, more than {self._max_age_s:g} s"
        return None

    def fresh(self, now_s: float) -> bool:
        """Return whether there is a good observation, and the newest is young enough to move on."""
        return self._captured_s is not None and now_s - self._captured_s <= self._max_age_s
