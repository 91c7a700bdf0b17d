"""``quantvla doctor``: is this machine ready? Exit code 0, or 1 when something fails."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from quantvla.runtime.doctor import examine

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command()
@click.argument("engine", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def doctor(engine: Path | None, as_json: bool) -> None:
    """Check Python, GPU, TensorRT, CUDA, power mode, clocks, memory and permissions, and ENGINE if given."""
    checks = examine(engine)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(checks), indent=1))
    else:
        table = Table()
        for column in ("check", "", "found", "what to do"):
            table.add_column(column, overflow="fold")
        for check in checks:
            colour = _COLOURS[check.status]
            table.add_row(check.name, f"[{colour}]{check.status}[/]", check.found, check.remedy)
        Console().print(table)
    sys.exit(int(any(check.status == "fail" for check in checks)))
