"""``quantvla replay``: a trace again on its engine; exit code 0 the same, 1 different, 2 error."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from quantvla.cli import options
from quantvla.runtime.control.replay import ReplayReport
from quantvla.runtime.control.replay import replay as run_replay

DIFFERENT = 1
_ROWS = 10


@click.command()
@click.argument("trace", type=options.DIRECTORY)
@click.option("--engine", type=options.DIRECTORY, help="Engine instead of the recorded one.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads  [default: as recorded].")
@click.option(
    "--tolerance",
    default=0.0,
    show_default=True,
    help="Largest action error that passes; 0: every bit.",
)
@options.as_json
def replay(
    trace: Path, engine: Path | None, threads: int | None, tolerance: float, as_json: bool
) -> None:
    """Run the inferences of TRACE again and compare the actions bit by bit."""
    report = run_replay(trace, engine=engine, threads=threads, tolerance=tolerance)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(report), indent=1))
    else:
        _print(report)
    sys.exit(0 if report.passed else DIFFERENT)


def _print(report: ReplayReport) -> None:
    console = Console()
    total = len(report.inferences)
    console.print(f"{report.identical} of {total} inferences identical", highlight=False)
    for same, what in ((report.same_engine, "engine"), (report.same_versions, "library versions")):
        if not same:
            console.print(f"[yellow]not the recorded {what}[/]")
    if not report.complete:
        console.print("[yellow]the trace was cut before the end of its run[/]")
    different = [one for one in report.inferences if not one.identical]
    if different:
        table = Table(title=f"first {min(len(different), _ROWS)} of {len(different)} that differ")
        for column in ("inference", "tick", "largest difference"):
            table.add_column(column, justify="right")
        for one in different[:_ROWS]:
            size = "no such chunk recorded" if one.max_abs is None else f"{one.max_abs:.3e}"
            if one.error is not None:
                size = f"fails now: {escape(one.error)}"
            table.add_row(str(one.index), str(one.tick), size)
        console.print(table)
    console.print("[green]pass[/]" if report.passed else "[red]different[/]")
