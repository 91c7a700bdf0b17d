"""``quantvla targets``: what engines can be made for."""

from __future__ import annotations

import click
import msgspec
from rich.console import Console
from rich.table import Table

from quantvla.runtime.targets import BOARDS, TARGETS, formats_of


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def targets(as_json: bool) -> None:
    """Print the targets and boards: TensorRT version, formats, memory, bandwidth and peak rates."""
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode({"targets": TARGETS, "boards": BOARDS})))
        return
    console = Console(width=None if Console().is_terminal else 180)
    console.print(_targets())
    console.print(_boards())
    console.print(
        "cpu: ONNX Runtime, the default of `quantvla export`. int4 is weight-only: the product is computed in fp16."
    )


def _targets() -> Table:
    table = Table(title="targets")
    for column in (
        "target",
        "library",
        "ONNX opset",
        "GPUs: formats",
        "system",
        "source",
        "verified",
    ):
        table.add_column(column, overflow="fold")
    for target in TARGETS.values():
        table.add_row(
            target.name, f"{target.library} >= {'.'.join(map(str, target.version))}", str(target.opset),
            "\n".join(f"SM{sm}: {' '.join(formats_of(sm))}" for sm in target.compute_capabilities),
            target.system, target.source, target.verified,
        )  # fmt: skip
    return table


def _boards() -> Table:
    table = Table(title="boards: 10^12 operations per second, dense")
    for column in ("board", "target", "GPU", "GB", "GB/s", "peak by format", "source", "verified"):
        table.add_column(column, overflow="fold")
    for board in BOARDS.values():
        table.add_row(
            board.name, board.target, f"SM{board.compute_capability}", f"{board.memory_gb:g}",
            f"{board.bandwidth_gb_s:g}",
            " ".join(f"{name} {rate:g}" for name, rate in board.peak_tera_per_s.items()), board.source,
            board.verified,
        )  # fmt: skip
    return table
