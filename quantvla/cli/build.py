"""``quantvla build``: an engine's graphs -> TensorRT plans for a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from quantvla.cli.progress import progress_bar
from quantvla.runtime.site_formats import SiteFormats, read_formats
from quantvla.runtime.tensorrt_build import BuildOptions, build_engine
from quantvla.runtime.tensorrt_plans import BuildRecord


@click.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option(
    "--compute-capability", type=int, metavar="N",
    help="Build for any GPU of SM N, without one here (tensorrt_rtx).  [default: this machine's GPU]",
)  # fmt: skip
@click.option(
    "--workspace", type=int, metavar="MIB", help="Scratch memory a layer may take at most."
)
@click.option("--level", type=click.IntRange(0, 5), help="The builder's optimization level.")
@click.option(
    "--allow-fallback", is_flag=True, help="Keep plans whose linears did not get their format; they are listed."
)  # fmt: skip
@click.option(
    "--linears", is_flag=True, help="Print for every linear what it runs in, by which layer."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def build(
    engine: Path, compute_capability: int | None, workspace: int | None, level: int | None,
    allow_fallback: bool, linears: bool, as_json: bool,
) -> None:  # fmt: skip
    """Build ENGINE (exported for jetson-orin, jetson-thor or rtx). A killed build continues when called again."""
    options = BuildOptions(compute_capability, workspace, level, allow_fallback)
    with progress_bar() as progress:
        record = build_engine(engine, options, progress=progress)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(record), indent=1))
    else:
        if linears:
            print_linears(read_formats(engine), (record,))
        print_record(record)


def print_record(record: BuildRecord) -> None:
    """Print the stages, and every linear that did not get its planned format."""
    console = Console(width=None if Console().is_terminal else 160)
    machine = record.machine
    table = Table(
        title=f"{machine.library} {machine.version}, SM{machine.compute_capability}, {machine.gpu}"
    )
    for column in (
        "stage",
        "MiB",
        "built in s",
        "linears by format",
        "layers by kind",
        "account from",
    ):
        table.add_column(column, overflow="fold")
    for plan in record.stages:
        ran: dict[str, int] = {}
        for site in plan.sites:
            ran[site.ran] = ran.get(site.ran, 0) + 1
        table.add_row(
            plan.stage, f"{plan.plan_bytes / 2**20:.2f}", f"{plan.build_s:.1f}", _counts(ran),
            _counts(plan.layers), plan.account,
        )  # fmt: skip
    console.print(table)
    lost = [site for plan in record.stages for site in plan.sites if not site.kept]
    if not lost:
        console.print("every linear got its planned format")
    for site in lost:
        console.print(
            f"[red]fallback[/] {site.site}: planned {site.planned}, runs {site.ran} ({site.layer})"
        )


def print_linears(planned: SiteFormats, records: Sequence[BuildRecord]) -> None:
    """Print every linear with its planned format and, for each record, what it runs in and by which layer."""
    console = Console(width=None if Console().is_terminal else 160)
    table = Table(title=f"linears, planned for {planned.board}")
    machines = [f"SM{record.machine.compute_capability}" for record in records]
    columns = [text for sm in machines for text in (f"{sm} runs", "kind of layer: layer")]
    for column in ("linear", "stage", "planned", *columns):
        table.add_column(column, overflow="fold")
    ran = [{s.site: s for stage in r.stages for s in stage.sites} for r in records]
    for site in planned.sites:
        found = [sites.get(site.site) for sites in ran]
        cells = [(s.ran, f"{s.kind}: {s.layer}") if s else ("not built", "") for s in found]
        table.add_row(site.site, site.stage, site.format, *(c for pair in cells for c in pair))
    console.print(table)


def _counts(found: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in found.items())
