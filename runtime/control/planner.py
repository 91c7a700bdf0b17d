"""The inference side of the loop: asks for chunks, takes them over, and knows what is planned."""

from __future__ import annotations

from collections.abc import Callable

from quantvla.runtime.control.cascade import Answer
from quantvla.runtime.control.clock import Clock
from quantvla.runtime.control.delay import DelayEstimate
from quantvla.runtime.control.notes import Notes
from quantvla.runtime.control.plan import Plan, empty_plan
from quantvla.runtime.control.strategy import Request, Strategy
from quantvla.runtime.control.trace import InferenceRecord
from quantvla.runtime.control.worker import Inference, Worker
from quantvla.runtime.preprocess import Observation


class Planner:
    """Keeps the plan. ``seam`` is true from the takeover of a chunk until `started` is called.

    ``max_errors``: inferences in a row that may fail before the run ends. ``answer``: which level of a
    cascade made the chunk that was finished last.
    """

    def __init__(
        self,
        strategy: Strategy,
        worker: Worker,
        clock: Clock,
        notes: Notes,
        *,
        dim: int,
        rate_hz: float,
        seed: int,
        max_errors: int,
        answer: Callable[[], Answer | None] = lambda: None,
    ) -> None:
        self.plan: Plan = empty_plan(dim)
        self.delay = DelayEstimate()
        self.seam = False
        self.latest = -1
        self._strategy, self._worker, self._clock, self._notes = strategy, worker, clock, notes
        self._rate_hz, self._seed, self._max_errors = rate_hz, seed, max_errors
        self._answer = answer
        self._next = 0
        self._submitted_s = 0.0
        self._errors_in_a_row = 0

    def wants(self, tick: int) -> bool:
        """Return whether a chunk whose row 0 is for ``tick`` is to be computed."""
        return not self._worker.busy and self._strategy.wants(self.plan, tick, self.delay.ticks)

    def running_s(self) -> float:
        """Return for how long the present inference has run, 0 if there is none."""
        return self._clock.now() - self._submitted_s if self._worker.busy else 0.0

    def submit(self, observation: Observation, tick: int) -> None:
        """Begin to compute a chunk whose row 0 is for ``tick``."""
        request = Request(
            index=self._next,
            observation=observation,
            tick=tick,
            ahead=self.plan.ahead(tick),
            delay_ticks=self.delay.ticks,
            seed=(self._seed << 32) + self._next,
        )
        self._next += 1
        self._submitted_s = self._clock.now()
        self._worker.submit(request)

    def wait_first(self, timeout_s: float) -> bool:
        """Take over the first chunk as the plan from tick 0 on; False if it is not there after ``timeout_s``."""
        result = self._worker.wait(timeout_s)
        if result is not None:
            self._finish(result, 0, delay=int(result.latency_s * self._rate_hz))
        return result is not None

    def take(self, tick: int) -> None:
        """Take over a chunk if one is finished."""
        result = self._worker.poll(tick)
        if result is None:
            return
        delay = tick - result.request.tick
        self._notes.counters.late_chunks += delay > result.request.delay_ticks
        self._finish(result, tick, delay=delay)

    def started(self) -> None:
        """Note that the first action of the latest chunk was given out."""
        self.seam = False

    def close(self) -> None:
        """End the inference thread."""
        self._worker.close()

    def _finish(self, result: Inference, tick: int, *, delay: int) -> None:
        self._record(result, tick)
        if result.chunk is None:
            self._note_error(result)
            return
        self._errors_in_a_row = 0
        self.delay.add(delay)
        counters, request = self._notes.counters, result.request
        counters.inferences += 1
        counters.inference_s.add(result.latency_s)
        counters.delay_ticks.add(tick - request.tick)
        merged = self._strategy.merge(self.plan, result.chunk, request.tick, tick)
        if merged is None:
            counters.discarded_chunks += 1
            self._notes.event(f"chunk {request.index} came {delay} ticks late: discarded")
            return
        self.plan, self.seam, self.latest = merged, True, request.index

    def _note_error(self, result: Inference) -> None:
        self._notes.counters.inference_errors += 1
        self._errors_in_a_row += 1
        self._notes.event(f"inference {result.request.index} failed: {result.error}")
        if self._errors_in_a_row >= self._max_errors:
            self._notes.stop(
                f"{self._errors_in_a_row} inferences in a row failed: {result.error}", failed=True
            )

    def _record(self, result: Inference, tick: int) -> None:
        request = result.request
        self._notes.record(
            InferenceRecord(
                index=request.index,
                tick=request.tick,
                arrived=tick,
                seed=request.seed,
                delay_ticks=request.delay_ticks,
                latency_ms=round(result.latency_s * 1e3, 4),
                ahead=request.ahead.tolist(),
                chunk=None if result.chunk is None else result.chunk.tolist(),
                error=None if result.error is None else str(result.error),
                answer=self._answer(),
            ),
            request.observation,
        )
