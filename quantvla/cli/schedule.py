"""``quantvla schedule``: fewer denoise steps at better places."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from quantvla.calib_sets import open_set
from quantvla.cli import options
from quantvla.cli.progress import progress_bar
from quantvla.families import load_policy
from quantvla.runtime.errors import explain
from quantvla.runtime.files import write_atomic
from quantvla.schedule import Schedule
from quantvla.schedule_fit import fit_schedule


@click.command()
@options.policy_path
@click.option("--calib", type=options.DIRECTORY, required=True, help="Calibration set.")
@click.option(
    "--steps", type=click.IntRange(min=1), required=True, help="Denoise steps of a chunk."
)
@click.option(
    "--frames", default=128, show_default=True, help="Calibration frames to fit on, at most."
)
@click.option(
    "--heldout-frames", default=64, show_default=True, help="Held-out frames to judge on, at most."
)
@options.seed
@click.option(
    "-o", "--output", type=options.DIRECTORY, required=True, help="File to write (.json)."
)
@options.overwrite
@options.as_json
def schedule(
    policy_path: Path, calib: Path, steps: int, frames: int, heldout_frames: int, seed: int, output: Path,
    overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Fit the times of fewer denoise steps so that the action stays nearest to that of the policy's own steps.

    The file goes into an engine with `quantvla export --schedule`.
    """
    if output.exists() and not overwrite:
        raise explain(output, "already exists", remedy="choose another output or pass --overwrite")
    loaded = load_policy(policy_path)
    with progress_bar() as progress:
        found = fit_schedule(
            loaded, open_set(calib), steps, frames=frames, heldout_frames=heldout_frames, seed=seed,
            progress=progress,
        )  # fmt: skip
    content = msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n"
    write_atomic(output, content)
    if as_json:
        click.echo(content, nl=False)
    else:
        _print(found)


def _print(found: Schedule) -> None:
    table = Table(
        title=f"relative action error against {found.own_steps} steps, {found.calibration}, seed {found.seed}"
    )
    table.add_column(f"{found.steps} steps")
    for column in ("nrmse", "mean of frames", "median of frames"):
        table.add_column(column, justify="right")
    for name, part in (
        (f"{found.frames} calibration frames", found.on_calibration),
        (f"{found.heldout_frames} held-out frames", found.on_heldout),
    ):
        for times, error in (("equal", part.equal), ("fitted", part.fitted)):
            table.add_row(
                f"{name}, {times}", f"{error.nrmse:.2%}", f"{error.mean:.2%}", f"{error.median:.2%}"
            )
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    console.print(f"times: {' '.join(f'{t:g}' for t in found.times)}")
