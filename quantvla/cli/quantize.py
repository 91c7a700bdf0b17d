"""``quantvla quantize``: checkpoint + calibration set + recipe -> quantized checkpoint."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from quantvla import quantize as compiler
from quantvla.calib_sets import limit, open_set
from quantvla.cli import options
from quantvla.cli.passes import print_passes
from quantvla.cli.plan import plan_summary
from quantvla.cli.progress import progress_bar
from quantvla.recipe import read_recipe


@click.command()
@options.policy_path
@click.option(
    "--calib", type=options.DIRECTORY, required=True, help="Calibration set (see `quantvla calib`)."
)
@click.option("--frames", default=256, show_default=True, help="Calibration frames to use at most.")
@options.recipe
@options.output
@options.seed
@options.overwrite
def quantize(
    policy_path: Path,
    calib: Path,
    frames: int,
    recipe: str,
    output: Path,
    seed: int,
    overwrite: bool,
) -> None:
    """Calibrate and quantize a LeRobot checkpoint. A killed run continues when it is called again."""
    chosen = read_recipe(recipe)
    calibration = limit(open_set(calib), frames=frames, seed=seed).part("calibration")
    with progress_bar() as progress:
        result = compiler.quantize(
            policy_path,
            calibration,
            chosen,
            output,
            seed=seed,
            overwrite=overwrite,
            progress=progress,
        )
    console = Console(stderr=True)
    console.print(f"{len(calibration)} frames of {calibration.card.name}, all denoise steps")
    console.print(plan_summary(result.plan))
    print_passes(result.reports, console)
    console.print(f"wrote {output}")
