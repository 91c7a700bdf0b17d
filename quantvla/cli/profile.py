"""``quantvla profile``: how long the kernels of a policy's linears take on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from quantvla.checkpoint import is_quantized
from quantvla.cli import options
from quantvla.cli.progress import progress_bar
from quantvla.export.source import load_source
from quantvla.families import load_policy
from quantvla.latency_table import Kernel, LatencyTable, TableFile, read_table
from quantvla.mixed.cache import cache_directory
from quantvla.mixed.choose import planned_kernels, policy_kernels
from quantvla.mixed.offers import DEFAULT_FORMATS, parse_formats
from quantvla.mixed.profile import ROUNDS, measure_missing, this_machine
from quantvla.runtime.errors import explain
from quantvla.runtime.files import write_atomic


@click.command()
@options.policy_path
@click.option("--target", default="cpu", show_default=True, help="Target whose kernels to time.")
@click.option(
    "--format",
    "formats",
    multiple=True,
    help="A format to time, scheme:block; may be given several times.  "
    f"[default: {', '.join(DEFAULT_FORMATS)}]",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=3),
    default=ROUNDS,
    show_default=True,
    help="Turns; the median over them counts.",
)
@click.option("--fresh", is_flag=True, help="Measure again what was measured before.")
@click.option(
    "--from",
    "given",
    type=options.DIRECTORY,
    help="Print this table, after checking that it is of this machine.",
)
@click.option("-o", "--output", type=options.DIRECTORY, help="Also write the table here.")
@options.threads
@options.cache
@options.as_json
def profile(
    policy_path: Path, target: str, formats: tuple[str, ...], rounds: int, fresh: bool,
    given: Path | None, output: Path | None, threads: int | None, cache: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure each linear's shape in each format, and keep the times for `quantvla plan` and `export`.

    Of a quantized checkpoint, the formats of its plan, with every operator that computes them.
    """
    machine = this_machine(target, threads)
    if given is not None:
        table = read_table(given, machine)
    else:
        wanted = _wanted(policy_path, formats)
        file = TableFile(cache or cache_directory(), machine)
        if fresh:
            file.path.unlink(missing_ok=True)
        with progress_bar() as progress:
            table = measure_missing(wanted, file, rounds=rounds, progress=progress).only(wanted)
        click.echo(f"kept in {file.path}", err=True)
    encoded = msgspec.json.format(msgspec.json.encode(table), indent=1)
    if output is not None:
        write_atomic(output, encoded)
    if as_json:
        click.echo(encoded)
    else:
        print_table(table)


def _wanted(policy: Path, formats: tuple[str, ...]) -> list[Kernel]:
    if not is_quantized(policy):
        return policy_kernels(load_policy(policy), parse_formats(formats or DEFAULT_FORMATS))
    if formats:
        raise explain(
            policy, "a quantized checkpoint's plan says its formats", remedy="leave --format out"
        )
    return planned_kernels(load_source(policy).loaded)


def print_table(table: LatencyTable) -> None:
    """Print a row per linear and a column per format: microseconds of one call, by operator where several compute it."""
    times = table.operators()
    formats = list(dict.fromkeys(kernel.format for kernel in times))
    console = Console(width=None if Console().is_terminal else 160)
    shown = Table(title=f"microseconds a call: {table.machine.describe()}")
    shown.add_column("input")
    shown.add_column("out", justify="right")
    for form in formats:
        shown.add_column(form, justify="right")
    rows = dict.fromkeys((kernel.shape, kernel.out_features, kernel.bias) for kernel in times)
    for shape, out_features, bias in rows:
        found = [times.get(Kernel(shape, out_features, bias, form)) for form in formats]
        fastest = min(min(value.values()) for value in found if value is not None)
        shown.add_row(
            " x ".join(map(str, shape)), f"{out_features}{' + bias' if bias else ''}",
            *(_cell(value, fastest) for value in found),
        )  # fmt: skip
    console.print(shown)


def _cell(value: Mapping[str, float] | None, fastest: float) -> str:
    lines = []
    for operator, found in (value or {}).items():
        number = f"[bold]{found:.1f}[/bold]" if found == fastest else f"{found:.1f}"
        lines.append(f"{operator} {number}" if len(value or {}) > 1 else number)
    return "\n".join(lines) or "-"
