"""What a run of the loop counted, and its report."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np

from quantvla.runtime.reuse import ReuseCounts

WINDOW = 1 << 16
"""How many of the last measurements the percentiles are taken over: 22 minutes of ticks at 50 Hz."""


class Spread(msgspec.Struct, frozen=True):
    """Median, 99th percentile and largest of a number of measurements; all 0 when there were none."""

    p50: float
    p99: float
    max: float


class Samples:
    """Measurements in constant memory: percentiles of the last `WINDOW`, and the largest of all."""

    def __init__(self) -> None:
        self.count = 0
        self._ring = np.zeros(WINDOW, dtype=np.float64)
        self._largest = -np.inf

    def add(self, value: float) -> None:
        """Note one measurement."""
        self._ring[self.count % WINDOW] = value
        self._largest = max(self._largest, value)
        self.count += 1

    def spread(self, scale: float = 1.0, last: int | None = None) -> Spread:
        """Return the spread times ``scale``, to four decimals; of the ``last`` measurements only if given."""
        if self.count == 0:
            return Spread(0.0, 0.0, 0.0)
        kept = min(self.count, WINDOW)
        if last is None:
            values, largest = self._ring[:kept], self._largest
        else:
            rows = np.arange(self.count - min(last, kept), self.count) % WINDOW
            values = self._ring[rows]
            largest = values.max()
        p50, p99 = np.percentile(values, (50, 99))
        return Spread(*(round(float(v) * scale, 4) for v in (p50, p99, largest)))


class CascadeCounts(msgspec.Struct):
    """How many chunks were asked for, were escalated, or would have been if there had been time."""

    chunks: int = 0
    escalated: int = 0
    no_time: int = 0


class LoopReport(msgspec.Struct, frozen=True, kw_only=True):
    """One run. Times in milliseconds unless the name says otherwise.

    A deadline is missed when the tick's command leaves more than a quarter of the period late, or
    not at all because the tick had passed. ``jitter_ms``: how late the loop woke. ``overhead_ms``:
    what a tick took in this package's own code: neither the robot's calls nor the inference.
    ``held``: ticks in which no planned action was sent, of which ``starved`` had none planned.
    ``seam_step``: largest change of a command entry at the switch to another chunk, as the plan
    had it, before the guard.
    """

    ticks: int
    rate_hz: float
    seconds: float
    stop_cause: str
    failed: bool
    deadline_misses: int
    skipped_ticks: int
    jitter_ms: Spread
    overhead_ms: Spread
    act_ms: Spread
    observe_ms: Spread
    inference_ms: Spread
    delay_ticks: Spread
    inferences: int
    inference_errors: int
    late_chunks: int
    discarded_chunks: int
    starved: int
    held: int
    stale_observations: int
    observation_errors: int
    seam_step: Spread
    interventions: dict[str, int]
    trace_lost: int
    cascade: CascadeCounts | None = None
    reuse: ReuseCounts | None = None


class Counters:
    """Collects measurements while the loop runs, in constant memory."""

    def __init__(self) -> None:
        self.ticks = self.deadline_misses = self.skipped_ticks = 0
        self.inferences = self.inference_errors = self.late_chunks = self.discarded_chunks = 0
        self.starved = self.held = self.stale_observations = self.observation_errors = 0
        self.late_s = Samples()
        self.overhead_s = Samples()
        self.act_s = Samples()
        self.observe_s = Samples()
        self.inference_s = Samples()
        self.delay_ticks = Samples()
        self.seam_steps = Samples()

    def report(
        self,
        *,
        rate_hz: float,
        seconds: float,
        stop_cause: str,
        failed: bool,
        interventions: Mapping[str, int],
        trace_lost: int,
    ) -> LoopReport:
        """Return everything counted so far."""
        return LoopReport(
            ticks=self.ticks,
            rate_hz=rate_hz,
            seconds=round(seconds, 3),
            stop_cause=stop_cause,
            failed=failed,
            deadline_misses=self.deadline_misses,
            skipped_ticks=self.skipped_ticks,
            jitter_ms=self.late_s.spread(1e3),
            overhead_ms=self.overhead_s.spread(1e3),
            act_ms=self.act_s.spread(1e3),
            observe_ms=self.observe_s.spread(1e3),
            inference_ms=self.inference_s.spread(1e3),
            delay_ticks=self.delay_ticks.spread(),
            inferences=self.inferences,
            inference_errors=self.inference_errors,
            late_chunks=self.late_chunks,
            discarded_chunks=self.discarded_chunks,
            starved=self.starved,
            held=self.held,
            stale_observations=self.stale_observations,
            observation_errors=self.observation_errors,
            seam_step=self.seam_steps.spread(),
            interventions=dict(interventions),
            trace_lost=trace_lost,
        )
