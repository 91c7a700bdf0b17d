"""``quantvla export``: checkpoint -> engine directory."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from quantvla.cli import options
from quantvla.cli.progress import progress_bar
from quantvla.export.engine import TARGETS, export_engine


@click.command()
@click.argument("checkpoint", type=options.DIRECTORY)
@click.option(
    "--target", default="cpu", show_default=True, help=f"Where it runs: {', '.join(TARGETS)}."
)
@click.option(
    "--guidance", is_flag=True, help="Add the graph for real-time chunking with guidance 'vjp'."
)
@options.output
@options.overwrite
def export(checkpoint: Path, target: str, guidance: bool, output: Path, overwrite: bool) -> None:
    """Export CHECKPOINT as an engine: a quantized one, or a LeRobot one for the float engine."""
    with progress_bar() as progress:
        manifest = export_engine(
            checkpoint, target, output, overwrite=overwrite, guidance=guidance, progress=progress
        )
    size = sum(path.stat().st_size for path in output.iterdir())
    Console(stderr=True).print(
        f"wrote {output}: {manifest.recipe} for {target}, {len(manifest.stages)} graphs, {size / 2**20:.1f} MiB"
    )
