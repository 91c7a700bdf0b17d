"""``quantvla build``: an engine's graphs -> TensorRT plans for a GPU."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from quantvla.cli.progress import progress_bar
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
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def build(
    engine: Path, compute_capability: int | None, workspace: int | None, level: int | None,
    allow_fallback: bool, as_json: bool,
) -> None:  # fmt: skip
    """Build ENGINE (exported for jetson-orin, jetson-thor or rtx). A killed build continues when called again."""
    options = BuildOptions(compute_capability, workspace, level, allow_fallback)
    with progress_bar() as progress:
        record = build_engine(engine, options, progress=progress)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(record), indent=1))
    else:
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


def _counts(found: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in found.items())
