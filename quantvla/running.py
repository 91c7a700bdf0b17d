"""A run file put together: engine, robot, strategy, guard and loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import msgspec

from quantvla.rerun_recording import require_rerun, write_rerun
from quantvla.robots.dry import DryRobot
from quantvla.robots.opening import opened_robot, relative_actions, slow_observe
from quantvla.run_config import GuardSection, RunConfig
from quantvla.runtime.control.cascade import Cascade
from quantvla.runtime.control.clock import MonotonicClock, VirtualClock
from quantvla.runtime.control.counters import LoopReport
from quantvla.runtime.control.guard import MotionGuard
from quantvla.runtime.control.limits import Limits, limits_from_manifest, read_limits
from quantvla.runtime.control.loop import ControlLoop, LoopOptions
from quantvla.runtime.control.robot import Robot
from quantvla.runtime.control.spec import build_strategy, opened_cascade
from quantvla.runtime.control.strategy import Strategy
from quantvla.runtime.control.trace import Header, TraceWriter
from quantvla.runtime.control.urdf import read_urdf
from quantvla.runtime.control.watchdog import WatchdogOptions
from quantvla.runtime.control.worker import DelayedWorker, Worker
from quantvla.runtime.errors import explain
from quantvla.runtime.files import sha256_file
from quantvla.runtime.manifest import MANIFEST_FILE, Manifest, read_manifest
from quantvla.runtime.policy import Policy

WARM_UP_RUNS = 2


@dataclass(frozen=True)
class PreparedRun:
    """Everything of a run that is ready to go: call ``loop.run``."""

    config: RunConfig
    loop: ControlLoop
    limits: Limits
    robot: Robot
    trace: TraceWriter | None
    cascade: Cascade | None
    policy: Policy

    def run(self) -> LoopReport:
        """Run to the end and return the report, with the trace written as far as it can be."""
        report = self.loop.run(seconds=self.config.loop.seconds)
        if self.cascade is not None:
            report = msgspec.structs.replace(report, cascade=self.cascade.counts)
        report = msgspec.structs.replace(report, reuse=self.policy.reuse_counts)
        if self.trace is None:
            return report
        self.trace.close()
        if self.config.log.rerun is not None:
            write_rerun(self.trace.path, self.config.log.rerun)
        return msgspec.structs.replace(report, trace_lost=self.trace.lost())


@contextmanager
def prepared_run(
    config: RunConfig, *, dry_run: bool = False, on_tick: Callable[[], None] = lambda: None
) -> Iterator[PreparedRun]:
    """Yield the run of a configuration, warmed up; engine, robot and trace are closed at the end.

    Raises `QuantVLAError` for whatever does not fit together, before the robot is touched where possible.
    """
    manifest = read_manifest(config.engine)
    if config.log.rerun is not None:
        require_rerun()
    with ExitStack() as stack:
        robot = stack.enter_context(opened_robot(config.robot, manifest))
        limits = find_limits(config.guard, manifest, relative_actions(robot))
        policy = stack.enter_context(
            Policy.from_pretrained(config.engine, threads=config.threads, reuse=config.reuse)
        )
        cascade = None
        if config.cascade is not None:
            cascade = stack.enter_context(
                opened_cascade(config.cascade, config.strategy, policy, warm_up=WARM_UP_RUNS)
            )
        strategy = build_strategy(config.strategy, policy, cascade)
        policy.warm_up(WARM_UP_RUNS)
        trace = None
        if config.log.trace is not None:
            trace = _open_trace(config.log.trace, config, policy, limits, dry_run=dry_run)
            stack.callback(trace.close)
        section = config.loop
        every_tick = section.observe_every_tick
        virtual = section.clock == "virtual"
        loop = ControlLoop(
            DryRobot(robot) if dry_run else robot,
            strategy,
            rate_hz=section.rate_hz,
            guard=MotionGuard(
                limits,
                section.rate_hz,
                mode=config.guard.mode,
                kill_after=config.guard.kill_after or None,
            ),
            options=LoopOptions(
                max_age_s=section.max_age_s,
                observe_every_tick=not slow_observe(robot) if every_tick is None else every_tick,
                state_key=manifest.state.key,
            ),
            watchdog=WatchdogOptions(
                robot_s=config.watchdog.robot_s,
                inference_s=config.watchdog.inference_s,
                hold_s=config.watchdog.hold_s,
                heartbeat=config.watchdog.heartbeat,
            ),
            trace=trace,
            clock=VirtualClock() if virtual else MonotonicClock(),
            worker=_delayed(section.delay_ticks) if virtual else None,
            seed=config.seed,
            on_tick=on_tick,
            answer=lambda: None if cascade is None else cascade.answer,
        )
        yield PreparedRun(config, loop, limits, robot, trace, cascade, policy)


def find_limits(section: GuardSection, manifest: Manifest, relative: tuple[bool, ...]) -> Limits:
    """Return the limits of a guard section; ``relative`` is what the robot says of its actions."""
    if section.limits is not None and section.urdf is not None:
        raise explain("guard", "limits and urdf are both given", remedy="keep one of them")
    if section.limits is not None:
        return read_limits(section.limits, manifest.action)
    if section.urdf is not None:
        return read_urdf(section.urdf, manifest.action, degrees=section.degrees)
    return limits_from_manifest(manifest, relative)


def _delayed(delay_ticks: int) -> Callable[[Strategy], Worker]:
    return lambda strategy: DelayedWorker(strategy.predict, delay_ticks)


def _open_trace(
    path: Path, config: RunConfig, policy: Policy, limits: Limits, *, dry_run: bool
) -> TraceWriter:
    header = Header(
        engine=str(policy.directory.resolve()),
        manifest_sha256=sha256_file(policy.directory / MANIFEST_FILE),
        threads=policy.threads,
        versions=policy.versions,
        strategy=config.strategy,
        cascade=config.cascade,
        reuse=config.reuse,
        rate_hz=config.loop.rate_hz,
        joints=tuple(joint.name for joint in limits.joints),
        started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        dry_run=dry_run,
    )
    try:
        return TraceWriter(path, header)
    except OSError as error:
        raise explain(
            path, "the trace cannot be written", got=error, remedy="choose another place"
        ) from error
