"""``quantvla package``: engine -> one archive for the robot."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from quantvla.deploy.package import write_package


@click.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Archive to write, *.tar.zst."
)  # fmt: skip
@click.option(
    "--wheel",
    type=click.Path(path_type=Path),
    help="Wheel of quantvla.  [default: built from source]",
)
def package(engine: Path, output: Path, wheel: Path | None) -> None:
    """Pack ENGINE (for a GPU target) with the runtime wheel, install and run scripts, Dockerfile and unit."""
    manifest = write_package(engine, output, wheel=wheel)
    Console(stderr=True).print(
        f"wrote {output}: {manifest.family}, {manifest.recipe}, for {manifest.target}, "
        f"{output.stat().st_size / 2**20:.1f} MiB"
    )
