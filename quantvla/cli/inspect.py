"""``quantvla inspect``: what an engine is made of."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click
import msgspec
import onnx_ir as ir
from rich.console import Console
from rich.table import Table

from quantvla.cli import options
from quantvla.runtime.manifest import check_files, encode_manifest, read_manifest


@click.command()
@click.argument("engine", type=options.DIRECTORY)
@options.as_json
def inspect(engine: Path, as_json: bool) -> None:
    """Print an ENGINE's stages, operators and files, after checking its checksums."""
    manifest = read_manifest(engine)
    check_files(engine, manifest)
    operators = {stage.name: _operators(engine / stage.file) for stage in manifest.stages}
    if as_json:
        click.echo(
            msgspec.json.encode(
                {"manifest": msgspec.Raw(encode_manifest(manifest)), "operators": operators}
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


def _operators(path: Path) -> dict[str, int]:
    return dict(Counter(node.op_type for node in ir.load(path).graph).most_common())
