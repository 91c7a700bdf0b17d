"""Where the parts of a loop put what they count, what is worth a line, and why the run ends."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping

from quantvla.runtime.control.counters import Counters
from quantvla.runtime.control.trace import EventRecord, Record, Trace

_logger = logging.getLogger(__name__)


class Notes:
    """Shared by the parts of one run. ``recent`` keeps the last events for a view."""

    def __init__(self, trace: Trace) -> None:
        self.counters = Counters()
        self.recent: deque[str] = deque(maxlen=8)
        self.tick = 0
        self.cause: str | None = None
        self.failed = False
        self._trace = trace

    def stop(self, cause: str, *, failed: bool = False) -> None:
        """End the run before the next tick. The first cause stays."""
        if self.cause is None:
            self.failed, self.cause = failed, cause

    def event(self, text: str) -> None:
        """Log a line and put it into the trace."""
        _logger.warning("tick %d: %s", self.tick, text)
        self.recent.append(f"tick {self.tick}: {text}")
        self._trace.write(EventRecord(tick=self.tick, text=text))

    def record(self, record: Record, observation: Mapping[str, object] | None = None) -> None:
        """Put a record into the trace."""
        self._trace.write(record, observation)

    def lost(self) -> int:
        """Return how many records the trace has lost."""
        return self._trace.lost()
