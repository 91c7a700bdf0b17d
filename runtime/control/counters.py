"""What a run of the loop counted, and its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np


class Spread(msgspec.Struct, frozen=True):
    """Median, 99th percentile and largest of a number of measurements; all 0 when there were none."""

    p50: float
    p99: float
    max: float


def spread(values: Sequence[float], scale: float = 1.0) -> Spread:
    """Return the spread of ``values`` times ``scale``, to four decimals."""
    if not values:
        return Spread(0.0, 0.0, 0.0)
    p50, p99 = np.percentile(values, (50, 99))
    return Spread(*(round(float(v) * scale, 4) for v in (p50, p99, max(values))))


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


class Counters:
    """Collects measurements while the loop runs; memory grows by some bytes a tick."""

    def __init__(self) -> None:
        self.ticks = self.deadline_misses = self.skipped_ticks = 0
        self.inferences = self.inference_errors = self.late_chunks = self.discarded_chunks = 0
        self.starved = self.held = self.stale_observations = self.observation_errors = 0
        self.late_s: list[float] = []
        self.overhead_s: list[float] = []
        self.act_s: list[float] = []
        self.observe_s: list[float] = []
        self.inference_s: list[float] = []
        self.delay_ticks: list[float] = []
        self.seam_steps: list[float] = []

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
            jitter_ms=spread(self.late_s, 1e3),
            overhead_ms=spread(self.overhead_s, 1e3),
            act_ms=spread(self.act_s, 1e3),
            observe_ms=spread(self.observe_s, 1e3),
            inference_ms=spread(self.inference_s, 1e3),
            delay_ticks=spread(self.delay_ticks),
            inferences=self.inferences,
            inference_errors=self.inference_errors,
            late_chunks=self.late_chunks,
            discarded_chunks=self.discarded_chunks,
            starved=self.starved,
            held=self.held,
            stale_observations=self.stale_observations,
            observation_errors=self.observation_errors,
            seam_step=spread(self.seam_steps),
            interventions=dict(interventions),
            trace_lost=trace_lost,
        )
