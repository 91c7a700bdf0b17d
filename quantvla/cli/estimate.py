"""``quantvla estimate``: roofline latency on a board, from a graph or from a published policy's shapes."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from quantvla.cli import options
from quantvla.known_shapes import MODELS, PUBLISHED
from quantvla.roofline import BANDWIDTH_SHARE, COMPUTE_SHARE, Estimate
from quantvla.roofline import estimate as make_estimate
from quantvla.runtime.errors import explain, nearest
from quantvla.runtime.targets import Board, board_named, boards_of, target_named

_TARGET = "jetson-orin"


class PublishedRow(msgspec.Struct, frozen=True):
    """A published figure beside the estimate of the same model, board and format."""

    model: str
    board: str
    format: str
    published_ms: float
    estimated_ms: float
    ratio: float
    source: str


@click.command()
@click.argument("engine", type=options.DIRECTORY, required=False)
@click.option("--model", help=f"A published policy instead of ENGINE: {', '.join(MODELS)}.")
@click.option(
    "--target", help=f"Target whose boards are estimated.  [default: {_TARGET}, or the board's]"
)
@click.option("--board", help="One board.  [default: all of the target]")
@click.option(
    "--format", "number_format", default="fp16", show_default=True, help="Weights of --model."
)
@click.option(
    "--published", is_flag=True, help="Compare with published figures and print the ratios."
)
@options.as_json
def estimate(
    engine: Path | None, model: str | None, target: str | None, board: str | None, number_format: str,
    published: bool, as_json: bool,
) -> None:  # fmt: skip
    """Estimate the latency of a chunk. An ESTIMATE: roofline arithmetic, nothing is run or measured."""
    if published:
        rows = published_rows()
        if as_json:
            click.echo(msgspec.json.format(msgspec.json.encode(rows), indent=1))
        else:
            _print_published(rows)
        return
    found = [_estimate_on(engine, model, one.name, number_format) for one in _boards(target, board)]
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found), indent=1))
    else:
        for one in found:
            print_estimate(one)


def _boards(target: str | None, board: str | None) -> tuple[Board, ...]:
    if board is None:
        return boards_of(target_named(target or _TARGET).name)
    one = board_named(board)
    if target is not None and one.target != target_named(target).name:
        raise explain(
            f"board {board}", f"belongs to target {one.target}", got=f"--target {target}",
            remedy="leave --target out",
        )  # fmt: skip
    return (one,)


def _estimate_on(
    engine: Path | None, model: str | None, board: str, number_format: str
) -> Estimate:
    if (engine is None) == (model is None):
        raise explain("estimate", "expected either ENGINE or --model", remedy="give one of them")
    if model is not None:
        if model not in MODELS:
            raise explain(f"model {model!r}", "unknown", remedy=nearest(model, MODELS))
        known = MODELS[model]
        return make_estimate(
            f"{known.title}: {known.inputs}", known.works(), board_named(board), number_format
        )
    assert engine is not None
    from quantvla.export.graph_work import engine_work
    from quantvla.runtime.manifest import read_manifest
    from quantvla.runtime.site_formats import read_formats

    manifest, formats = read_manifest(engine), read_formats(engine)
    works = engine_work(engine, manifest, formats)
    return make_estimate(str(engine), works, board_named(board), "as planned", formats.activations)


def published_rows() -> tuple[PublishedRow, ...]:
    """Return every published figure with the estimate beside it."""
    rows = []
    for row in PUBLISHED:
        found = make_estimate(
            row.model, MODELS[row.model].works(), board_named(row.board), row.format, "bf16"
        )
        rows.append(
            PublishedRow(
                row.model,
                row.board,
                row.format,
                row.latency_ms,
                round(found.total_ms, 1),
                round(found.total_ms / row.latency_ms, 2),
                row.source,
            )
        )
    return tuple(rows)


def print_estimate(found: Estimate) -> None:
    """Print the stages of an estimate."""
    board = board_named(found.board)
    table = Table(title=f"ESTIMATE, not measured: {found.what}; {board.title}, {found.format}")
    for column in ("stage", "runs", "Gop", "weights MB", "compute ms", "memory ms", "launches ms", "total ms", "bound by"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("stage", "bound by") else "right")
    for s in found.stages:
        table.add_row(
            s.stage, str(s.runs), f"{s.giga_operations:.1f}", f"{s.weight_mb:.1f}", f"{s.compute_ms:.2f}",
            f"{s.memory_ms:.2f}", f"{s.launch_ms:.2f}", f"{s.total_ms:.2f}", s.bound,
        )  # fmt: skip
    table.add_row("chunk", "", "", "", "", "", "", f"{found.total_ms:.1f}", "")
    console = Console(width=None if Console().is_terminal else 140)
    console.print(table)
    console.print(
        f"roofline at {COMPUTE_SHARE:.0%} of peak arithmetic and {BANDWIDTH_SHARE:.0%} of bandwidth, "
        f"{board.launch_us:g} us a kernel (assumed); without preprocessing\nrates of the board: {board.verified}"
    )


def _print_published(rows: tuple[PublishedRow, ...]) -> None:
    table = Table(title="ESTIMATES beside published figures (ms a chunk, batch 1)")
    for column in ("model", "board", "format", "published", "estimated", "ratio", "source"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row.model, row.board, row.format, f"{row.published_ms:g}", f"{row.estimated_ms:g}",
            f"{row.ratio:g}", row.source,
        )  # fmt: skip
    Console(width=None if Console().is_terminal else 140).print(table)
