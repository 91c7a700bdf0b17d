"""``quantvla inspect``: what an engine is made of."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import click
import msgspec
import onnx_ir as ir
from rich.console import Console
from rich.table import Table

from quantvla.cli import options
from quantvla.cli.build import print_linears, print_record
from quantvla.export.integers import IntegerSite, integer_sites
from quantvla.plan import CARD_FILE
from quantvla.runtime import kernels
from quantvla.runtime.manifest import (
    KernelChoices,
    Manifest,
    check_files,
    encode_manifest,
    read_manifest,
)
from quantvla.runtime.site_formats import read_formats
from quantvla.runtime.targets import TARGETS as GPU_TARGETS
from quantvla.runtime.tensorrt_plans import read_records
from quantvla.schemes import scheme_name


@click.command()
@click.argument("engine", type=options.DIRECTORY)
@options.as_json
def inspect(engine: Path, as_json: bool) -> None:
    """Print an ENGINE's stages, operators and files, after checking its checksums.

    For a GPU target also every linear's format, planned and in each plan that `quantvla build` made.
    Of a quantized checkpoint, print its plan in one line and what every pass did.
    """
    if (engine / CARD_FILE).is_file():
        _print_card(engine, as_json=as_json)
        return
    manifest = read_manifest(engine)
    check_files(engine, manifest)
    operators = {
        stage.name: _operators(engine / kernels.graph_file(stage)) for stage in manifest.stages
    }
    formats = _formats(engine, manifest)
    gpu = manifest.target in GPU_TARGETS
    planned, records = (read_formats(engine), read_records(engine)) if gpu else (None, ())
    if as_json:
        click.echo(
            msgspec.json.encode(
                {
                    "manifest": msgspec.Raw(encode_manifest(manifest)),
                    "operators": operators,
                    "formats": formats,
                    "planned": planned,
                    "plans": records,
                }
            )
        )
        return
    table = Table(title=f"{engine}: {manifest.family}, {manifest.recipe}, {manifest.target}")
    for column in ("stage", "runs", "inputs", "outputs", "MiB", "operators"):
        table.add_column(column, overflow="fold")
    for stage in manifest.stages:
        files = [engine / name for name in manifest.files if name.startswith(stage.file)]
        table.add_row(
            stage.name, str(stage.repeat),
            "\n".join(f"{spec.name} {list(spec.shape)}" for spec in stage.inputs),
            "\n".join(f"{spec.name} {list(spec.shape)}" for spec in stage.outputs),
            f"{sum(path.stat().st_size for path in files) / 2**20:.2f}",
            ", ".join(f"{count} {name}" for name, count in operators[stage.name].items()),
        )  # fmt: skip
    Console().print(table)
    if formats:
        Console().print(_formats_table(formats))
        if manifest.kernels is not None:
            wide = None if Console().is_terminal else max(Console().width, 160)
            Console(width=wide).print(_choices_table(manifest.kernels))
        Console().print(f"integer linears run on {_kernels(manifest)} kernels on this machine")
    if planned is not None:
        print_linears(planned, records)
    for record in records:
        print_record(record)


def _print_card(directory: Path, *, as_json: bool) -> None:
    """Print the plan's totals and every pass of a quantized checkpoint; as JSON the whole card."""
    from quantvla.checkpoint import read_card  # loads the compiler, which engines do not need
    from quantvla.cli.passes import print_passes
    from quantvla.cli.plan import plan_summary

    card = read_card(directory)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(card), indent=1))
        return
    console = Console(width=None if Console().is_terminal else 160)
    console.print(f"{directory}: {card.family}, recipe {card.recipe.name}")
    console.print(plan_summary(card.plan))
    print_passes(card.reports, console)


class Format(msgspec.Struct, frozen=True):
    """One number format in one stage: how many linears have it, and their bytes with and without it.

    ``block`` is 0 where a row of the weight has one scale.
    """

    stage: str
    scheme: str
    block: int
    sites: int
    bytes: int
    half_bytes: int


def _formats(engine: Path, manifest: Manifest) -> list[Format]:
    """Return the number formats of the integer linears, in the order of the stages."""
    found: dict[tuple[str, str, int], list[IntegerSite]] = {}
    for site in integer_sites(engine, manifest):
        weight = site.weight
        block = weight.block if weight.scales.shape[1] > 1 else 0
        found.setdefault((site.stage, scheme_name(weight.bits, weight.inputs), block), []).append(
            site
        )
    return [
        Format(
            *key, len(sites), sum(site.stored_bytes for site in sites),
            sum(2 * site.weight.codes.numel() for site in sites),
        )
        for key, sites in found.items()
    ]  # fmt: skip


def _kernels(manifest: Manifest) -> str:
    """Return whose kernels run the integer linears here, and why where they are not the project's own."""
    if any(stage.native for stage in manifest.stages):
        return kernels.available().describe()
    return "ONNX Runtime's (the engine has no graphs of own operators)"


def _formats_table(formats: list[Format]) -> Table:
    table = Table(title="integer linears")
    for column in ("stage", "scheme", "block", "linears", "MiB", "MiB in half precision"):
        table.add_column(column, justify="left" if column in ("stage", "scheme") else "right")
    for found in formats:
        table.add_row(
            found.stage, found.scheme, str(found.block or "row"), str(found.sites),
            f"{found.bytes / 2**20:.2f}", f"{found.half_bytes / 2**20:.2f}",
        )  # fmt: skip
    return table


def _choices_table(choices: KernelChoices) -> Table:
    """Return what the linears were exported as and why; those of several layers that agree in one row."""
    measured_on = f"measured on {choices.profile}" if choices.profile else "nothing measured"
    table = Table(title=f"operators of integer linears, {measured_on}")
    for column in ("stage", "linear", "input", "out", "format", "operator", "why", "microseconds"):
        table.add_column(column, overflow="fold")
    rows: dict[tuple[str, ...], int] = {}
    for site in choices.sites:
        times = ", ".join(f"{name} {value:.1f}" for name, value in site.median_us.items())
        row = (
            site.stage, re.sub(r"\d+", "*", site.site), " x ".join(map(str, site.shape)),
            str(site.out_features), site.format, site.operator, site.reason, times,
        )  # fmt: skip
        rows[row] = rows.get(row, 0) + 1
    for (stage, name, *others), count in rows.items():
        table.add_row(stage, f"{count} {name}", *others)
    return table


def _operators(path: Path) -> dict[str, int]:
    return dict(Counter(node.op_type for node in ir.load(path).graph).most_common())
