"""``quantvla run``: an engine drives a robot."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import msgspec
from rich.console import Console

from quantvla.cli import options
from quantvla.cli.live_view import live_view, report_lines, report_table
from quantvla.run_config import RunConfig, read_run_config
from quantvla.running import PreparedRun, prepared_run

FAILED = 1


@click.command()
@click.option("--config", "path", type=options.DIRECTORY, required=True, help="Run file (TOML).")
@click.option("--engine", type=options.DIRECTORY, help="Engine instead of the run file's.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), help="End after so long.")
@click.option("--trace", type=options.DIRECTORY, help="Trace instead of the run file's.")
@click.option("--dry-run", is_flag=True, help="Show actions, send none to the robot.")
@click.option("--no-view", is_flag=True, help="No live view in the terminal.")
@options.as_json
def run(
    path: Path,
    engine: Path | None,
    seconds: float | None,
    trace: Path | None,
    dry_run: bool,
    no_view: bool,
    as_json: bool,
) -> None:
    """Run an engine on a robot until its task or time ends, Ctrl-C, or a limit is broken.

    Exit code 0: ended as asked; 1: stopped by guard, watchdog or an error; 2: bad input.
    """
    config = _overridden(read_run_config(path), engine, seconds, trace)
    title = f"{config.engine.name} on {type(config.robot).__struct_config__.tag}"
    if dry_run:
        title += ", dry run: nothing is sent"
    shown = _ActionPrinter(enabled=dry_run and not as_json)
    with prepared_run(config, dry_run=dry_run, on_tick=shown.tick) as prepared:
        shown.prepared = prepared
        _announce(prepared)
        with live_view(prepared.loop, title, enabled=not (no_view or as_json)):
            report = prepared.run()
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(report), indent=1))
    else:
        console = Console()
        console.print(report_table(report, title))
        console.print(report_lines(report), highlight=False)
    sys.exit(FAILED if report.failed else 0)


class _ActionPrinter:
    """Prints the action of a tick, once a second."""

    def __init__(self, *, enabled: bool) -> None:
        self.prepared: PreparedRun | None = None
        self._enabled = enabled
        self._ticks = 0

    def tick(self) -> None:
        """Count a tick and print if a second has passed."""
        if not self._enabled or self.prepared is None:
            return
        loop = self.prepared.loop
        if self._ticks % max(round(loop.rate_hz), 1) == 0 and loop.sent is not None:
            values = " ".join(f"{value:+.4f}" for value in loop.sent)
            click.echo(f"tick {loop.notes.tick}: {values}")
        self._ticks += 1


def _announce(prepared: PreparedRun) -> None:
    """Say on stderr what guards the run, and what does not."""
    limits = prepared.limits
    fields = ("lower", "upper", "velocity", "acceleration", "jerk", "seam")
    unbounded = [
        name for name in fields if all(getattr(joint, name) is None for joint in limits.joints)
    ]
    note = f"guard: {prepared.loop.guard.mode}, limits from {limits.source}"
    if unbounded:
        note += f"; not bounded: {', '.join(unbounded)} (give a limits file)"
    Console(stderr=True).print(note, highlight=False)


def _overridden(
    config: RunConfig, engine: Path | None, seconds: float | None, trace: Path | None
) -> RunConfig:
    if engine is not None:
        config = msgspec.structs.replace(config, engine=engine)
    if seconds is not None:
        config = msgspec.structs.replace(
            config, loop=msgspec.structs.replace(config.loop, seconds=seconds)
        )
    if trace is not None:
        config = msgspec.structs.replace(
            config, log=msgspec.structs.replace(config.log, trace=trace)
        )
    return config
