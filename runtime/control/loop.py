"""The control loop: one action per tick on absolute deadlines, with inference beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.control.cascade import Answer
from quantvla.runtime.control.clock import Clock, MonotonicClock
from quantvla.runtime.control.counters import LoopReport
from quantvla.runtime.control.guard import MotionGuard, Verdict
from quantvla.runtime.control.interpreter import prompt_interpreter
from quantvla.runtime.control.notes import Notes
from quantvla.runtime.control.planner import Planner
from quantvla.runtime.control.robot import Robot
from quantvla.runtime.control.robot_link import RobotLink
from quantvla.runtime.control.signals import stopping_signals
from quantvla.runtime.control.strategy import Strategy
from quantvla.runtime.control.trace import EndRecord, NoTrace, TickRecord, Trace
from quantvla.runtime.control.watchdog import Watchdog, WatchdogOptions
from quantvla.runtime.control.worker import ThreadWorker, Worker
from quantvla.runtime.errors import explain

FloatArray = NDArray[np.float32]
_MISSED = 0.25
"""Share of the period by which a command may be late before its deadline counts as missed."""
_WATCHDOG = WatchdogOptions()


@dataclass(frozen=True)
class LoopOptions:
    """``max_age_s``: age at which an observation is too old to move on.

    ``observe_every_tick``: ask the robot in every tick, so that a camera that fails is noticed at
    once; without it only when a chunk is to be computed, for robots whose ``observe`` is slow (a
    simulator that renders). ``max_errors``: inferences in a row that may fail before the robot is
    stopped. ``state_key``: where an observation has the measured pose.
    """

    max_age_s: float = 0.5
    observe_every_tick: bool = True
    max_errors: int = 3
    state_key: str = "observation.state"


class ControlLoop:
    """Runs a policy on a robot at a fixed rate until it is told to stop, and always stops the robot.

        loop = ControlLoop(robot, RealTimeChunking(policy, execute=8), rate_hz=50,
                           guard=MotionGuard(limits_from_manifest(policy.manifest), 50))
        report = loop.run(seconds=60)

    In each tick: wait for the deadline, take over a finished chunk, let the guard check the tick's
    action, send it, observe, and begin an inference if the strategy wants one. Tick k's deadline
    is k periods after the start, whatever happened before; a tick that has passed is skipped, never
    made up for. Without an action for a tick the guard holds the robot where it is.

    Nothing that the engine, a camera or the disk does ends the loop in motion: errors lead to
    holding, and holding for too long, or a robot that fails or blocks, to ``robot.stop``.
    """

    def __init__(
        self,
        robot: Robot,
        strategy: Strategy,
        *,
        rate_hz: float,
        guard: MotionGuard,
        options: LoopOptions = LoopOptions(),
        watchdog: WatchdogOptions = _WATCHDOG,
        trace: Trace | None = None,
        clock: Clock | None = None,
        worker: Callable[[Strategy], Worker] | None = None,
        seed: int = 0,
        on_tick: Callable[[], None] = lambda: None,
        answer: Callable[[], Answer | None] = lambda: None,
    ) -> None:
        if not (math.isfinite(rate_hz) and rate_hz > 0):
            raise explain("rate_hz", "expected a positive number", got=rate_hz, remedy="change it")
        self.rate_hz, self.guard = rate_hz, guard
        self.notes = Notes(NoTrace() if trace is None else trace)
        self.sent: FloatArray | None = None
        self._clock = MonotonicClock() if clock is None else clock
        self._watchdog = Watchdog(robot.stop, watchdog)
        self.robot = RobotLink(robot, self._watchdog, self._clock, self.notes, options.max_age_s)
        self.planner = Planner(
            strategy,
            ThreadWorker(strategy.predict, self._clock) if worker is None else worker(strategy),
            self._clock,
            self.notes,
            dim=guard.limits.dim,
            rate_hz=rate_hz,
            seed=seed,
            max_errors=options.max_errors,
            answer=answer,
        )
        self._options, self._on_tick = options, on_tick
        self._period_s = 1.0 / rate_hz
        self._held_since_s: float | None = None
        self._sent_tick = -1

    def stop(self, cause: str) -> None:
        """End the run before the next tick; may be called from any thread."""
        self.notes.stop(cause)

    def run(self, *, ticks: int | None = None, seconds: float | None = None) -> LoopReport:
        """Run until `stop`, a signal, the robot's end, ``ticks`` or ``seconds``; the robot is stopped at the end.

        A loop runs once. Raises only errors of this package's own code, after stopping the robot.
        """
        if seconds is not None:
            ticks = round(seconds * self.rate_hz)
        start_s = self._clock.now()
        try:
            with ExitStack() as stack:
                stack.enter_context(stopping_signals(self.notes.stop, self.robot.stop))
                stack.enter_context(prompt_interpreter())
                stack.enter_context(self._watchdog.watching())
                self._first_chunk()
                start_s = self._clock.now()
                self._run_ticks(start_s, ticks)
        finally:
            self.robot.stop()
            self.planner.close()
        return self._report(self._clock.now() - start_s)

    def _first_chunk(self) -> None:
        """Fill the plan before the first tick, so that the robot does not start by waiting."""
        end_s = self._clock.now() + self._watchdog.options.hold_s
        self.robot.observe()
        while self.robot.problem is not None and self.notes.cause is None:
            if self._clock.now() >= end_s:
                self.notes.stop(f"no usable observation: {self.robot.problem}", failed=True)
            self._clock.sleep_until(self._clock.now() + self._period_s)
            self._check_watchdog()
            self.robot.observe()
        observation = self.robot.feed.latest
        if self.notes.cause is not None or observation is None:
            return
        self.guard.start_at(np.asarray(observation.get(self._options.state_key, ())))
        self.planner.submit(observation, 0)
        while self.notes.cause is None and not self.planner.wait_first(0.05):
            self._check_watchdog()

    def _run_ticks(self, start_s: float, ticks: int | None) -> None:
        tick, counters = 0, self.notes.counters
        while self.notes.cause is None and (ticks is None or tick < ticks):
            deadline_s = start_s + tick * self._period_s
            self._clock.sleep_until(deadline_s)
            if self.notes.cause is None:
                self._run_tick(tick, deadline_s)
            passed = int((self._clock.now() - start_s) / self._period_s + 1e-6)
            skipped = max(passed - tick - 1, 0)
            counters.skipped_ticks += skipped
            counters.deadline_misses += skipped
            tick += 1 + skipped
        self.notes.stop("time is up")

    def _run_tick(self, tick: int, deadline_s: float) -> None:
        begin_s, self.robot.spent_s = self._clock.now(), 0.0
        self.notes.tick = tick
        self._watchdog.ticked()
        self.planner.take(tick)
        self._send(tick, begin_s - deadline_s)
        self._check_watchdog()
        self._observe_and_request(tick + 1)
        self._check_watchdog()
        self._on_tick()
        counters = self.notes.counters
        counters.ticks += 1
        counters.late_s.add(begin_s - deadline_s)
        counters.overhead_s.add(self._clock.now() - begin_s - self.robot.spent_s)

    def _send(self, tick: int, late_s: float) -> None:
        """Send the tick's action, or hold."""
        planned = self.planner.plan.at(tick)
        verdict = self._judge(planned, tick)
        causes = tuple(intervention.cause for intervention in verdict.interventions)
        for intervention in verdict.interventions:
            self.notes.event(str(intervention))
        held = self._held(planned, causes)
        self.notes.counters.starved += planned is None
        self._note_held(held != "")
        if verdict.stop is not None:
            self.notes.stop(verdict.stop, failed=True)
        if verdict.action is not None and self.notes.cause is None:
            self.robot.act(verdict.action)
            self.sent, self._sent_tick = verdict.action, tick
            self.notes.counters.deadline_misses += late_s > _MISSED * self._period_s
        self.notes.record(
            TickRecord(
                tick=tick,
                late_ms=round(late_s * 1e3, 4),
                planned=None if planned is None else planned.tolist(),
                sent=self.sent.tolist()
                if self._sent_tick == tick and self.sent is not None
                else None,
                inference=self.planner.latest,
                held=held,
                causes=causes,
            )
        )

    def _judge(self, planned: FloatArray | None, tick: int) -> Verdict:
        """Return what the guard makes of the planned action, or of there being none."""
        ticks = tick - self._sent_tick if self._sent_tick >= 0 else 1
        if planned is None:
            return Verdict(self.guard.hold(ticks))
        seam = self.planner.seam
        if seam and self.sent is not None:
            step = np.abs(planned - self.sent).max()
            self.notes.counters.seam_steps.add(float(step))
        self.planner.started()
        stale = self._options.observe_every_tick and not self.robot.fresh()
        return self.guard.admit(planned, tick=tick, seam=seam, stale=stale, ticks=ticks)

    def _held(
        self, planned: FloatArray | None, causes: tuple[str, ...]
    ) -> Literal["", "starved", "guard"]:
        if planned is None:
            return "starved"
        rejected = self.guard.mode != "clamp" or {"not finite", "stale observation"} & set(causes)
        return "guard" if causes and rejected else ""

    def _observe_and_request(self, next_tick: int) -> None:
        if self.notes.cause is not None:
            return
        self.planner.take(next_tick)  # one that is there already makes room for the next inference
        wanted = self.planner.wants(next_tick)
        if wanted or self._options.observe_every_tick:
            self.robot.observe()
        observation = self.robot.feed.latest
        if wanted and observation is not None and self.robot.problem is None:
            self.planner.submit(observation, next_tick)

    def _note_held(self, held: bool) -> None:
        if not held:
            self._held_since_s = None
            return
        self.notes.counters.held += 1
        if self._held_since_s is None:
            self._held_since_s = self._clock.now()

    def _check_watchdog(self) -> None:
        """Stop for what has lasted too long."""
        limits = self._watchdog.options
        if self._watchdog.tripped is not None:
            self.notes.stop(self._watchdog.tripped, failed=True)
        if self.planner.running_s() > limits.inference_s:
            self.notes.stop(f"an inference has run for {limits.inference_s:g} s", failed=True)
        held_since_s = self._held_since_s
        if held_since_s is not None and self._clock.now() - held_since_s > limits.hold_s:
            why = f"; observation: {self.robot.problem}" if self.robot.problem else ""
            self.notes.stop(f"held for {limits.hold_s:g} s{why}", failed=True)

    def _report(self, seconds: float) -> LoopReport:
        report = self.notes.counters.report(
            rate_hz=self.rate_hz,
            seconds=seconds,
            stop_cause=self.notes.cause or "stopped",
            failed=self.notes.failed,
            interventions={str(cause): count for cause, count in self.guard.counts.items()},
            trace_lost=self.notes.lost(),
        )
        self.notes.record(EndRecord(report=report))
        return report
