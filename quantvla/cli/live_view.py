"""What a running loop looks like in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from quantvla.runtime.control.counters import LoopReport
from quantvla.runtime.control.loop import ControlLoop

_RECENT = 500


@contextmanager
def live_view(loop: ControlLoop, title: str, *, enabled: bool = True) -> Iterator[None]:
    """Show the loop on stderr while the block runs, four times a second."""
    console = Console(stderr=True)
    if not (enabled and console.is_terminal):
        yield
        return
    with Live(get_renderable=lambda: render(loop, title), console=console, refresh_per_second=4):
        yield


def render(loop: ControlLoop, title: str) -> RenderableType:
    """Return the present state of a loop as a table, its last events below."""
    counters, planner = loop.notes.counters, loop.planner
    late = counters.late_s.spread(1e3, last=_RECENT)
    latency = counters.inference_s.spread(1e3, last=50)
    table = Table(title=title, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    table.add_row(
        "rate",
        f"{loop.rate_hz:g} Hz, tick {loop.notes.tick}, jitter p50 {late.p50:.2f} p99 {late.p99:.2f} ms, "
        f"{counters.deadline_misses} missed",
    )
    table.add_row(
        "inference",
        f"p50 {latency.p50:.1f} p99 {latency.p99:.1f} ms, delay {planner.delay.ticks} ticks, "
        f"{counters.inferences} chunks, {counters.late_chunks} late, {counters.inference_errors} failed",
    )
    table.add_row(
        "queue",
        f"{planner.plan.remaining(loop.notes.tick)} actions, starved {counters.starved}, held {counters.held}",
    )
    table.add_row("observation", loop.robot.problem or "good")
    counts = ", ".join(f"{cause} {count}" for cause, count in loop.guard.counts.items())
    table.add_row("guard", f"{loop.guard.mode}: {counts or 'no intervention'}")
    sent = "none yet" if loop.sent is None else " ".join(f"{value:+.3f}" for value in loop.sent)
    table.add_row("action", sent)
    return Group(table, Text("\n".join(loop.notes.recent), style="yellow"))


def report_table(report: LoopReport, title: str) -> Table:
    """Return the report of a finished run as a table."""
    table = Table(title=title)
    table.add_column("what")
    for name in ("p50", "p99", "max"):
        table.add_column(name, justify="right")
    for what, values in (
        ("jitter, ms", report.jitter_ms),
        ("overhead per tick, ms", report.overhead_ms),
        ("robot act, ms", report.act_ms),
        ("robot observe, ms", report.observe_ms),
        ("inference, ms", report.inference_ms),
        ("delay, ticks", report.delay_ticks),
        ("step at a chunk's seam", report.seam_step),
    ):
        table.add_row(what, *(f"{value:.3f}" for value in (values.p50, values.p99, values.max)))
    return table


def report_lines(report: LoopReport) -> str:
    """Return the counts of a finished run as sentences."""
    share = report.deadline_misses / max(report.ticks, 1)
    guard = ", ".join(f"{cause} {count}" for cause, count in report.interventions.items())
    levels, reuse = report.cascade, report.reuse
    return (
        f"{'FAILED' if report.failed else 'ended'}: {report.stop_cause}\n"
        f"{report.ticks} ticks at {report.rate_hz:g} Hz in {report.seconds:.1f} s, "
        f"{report.deadline_misses} deadlines missed ({share:.2%}), {report.skipped_ticks} ticks skipped\n"
        f"{report.inferences} chunks, {report.late_chunks} late, {report.discarded_chunks} discarded, "
        f"{report.inference_errors} failed; held {report.held} ticks, starved {report.starved}\n"
        f"observations: {report.stale_observations} unusable, {report.observation_errors} errors; "
        f"guard: {guard or 'no intervention'}"
        + (
            f"\ncascade: {levels.escalated} of {levels.chunks} chunks from the better level, "
            f"{levels.no_time} not for want of time"
            if levels is not None
            else ""
        )
        + (
            f"\nreused: {reuse.images_reused} of {reuse.images} camera pictures, "
            f"{reuse.prefixes_reused} of {reuse.prefixes} prefixes"
            if reuse is not None
            else ""
        )
        + (f"\ntrace incomplete: {report.trace_lost} records lost" if report.trace_lost else "")
    )
