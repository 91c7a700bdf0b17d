"""``quantvla calib``: look at, build and record calibration sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
from rich.console import Console
from rich.table import Table

from quantvla.calib_sets import CalibrationSet, Selection, build_set, of_tasks, open_set, record
from quantvla.calib_sets.card import Part
from quantvla.calib_sets.images import ImageFormat
from quantvla.calib_sets.summary import Summary, summarize
from quantvla.cli.progress import progress_bar
from quantvla.progress import Progress
from quantvla.runtime.errors import explain

if TYPE_CHECKING:
    from quantvla.cli.demonstrations import Demonstration

_FORMAT = click.Choice(["jpeg", "png"])


@click.group()
def calib() -> None:
    """Look at, build and record calibration sets."""


@calib.command()
@click.argument("path", metavar="SET", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def info(path: Path, as_json: bool) -> None:
    """Show what is in SET: a calibration set, a LeRobotDataset v3 or a directory of NPZ files.

    Opening a set verifies the checksum of every file.
    """
    summary = summarize(open_set(path), path)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(summary), indent=2))
    else:
        _print_summary(Console(), summary)


@calib.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="New set.")
@click.option("--frames", type=click.IntRange(2), default=256, show_default=True)
@click.option("--heldout-frames", type=click.IntRange(1), default=64, show_default=True)
@click.option(
    "--heldout-episodes",
    help="Episodes of the held-out part, as 80-83,90 [default: those the source names, "
    "else the last 20 % of each task].",
)
@click.option(
    "--stride",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Use every N-th frame; an idle frame is one in which nothing moves within N frames.",
)
@click.option(
    "--min-motion",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.01,
    show_default=True,
    help="Least movement, as a share of the range of a state entry; 0 keeps idle frames.",
)
@click.option("--task", "tasks", multiple=True, help="Only frames of this instruction; repeatable.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--format", "image_format", type=_FORMAT, default="jpeg", show_default=True)
@click.option("--name", help="Name in the card [default: that of the directory].")
@click.option("--overwrite", is_flag=True, help="Replace an existing set.")
def build(
    source: Path,
    output: Path,
    frames: int,
    heldout_frames: int,
    heldout_episodes: str | None,
    stride: int,
    min_motion: float,
    tasks: tuple[str, ...],
    seed: int,
    image_format: ImageFormat,
    name: str | None,
    overwrite: bool,
) -> None:
    """Choose frames of SOURCE, a LeRobotDataset v3, a directory of NPZ files or another set, and write a set.

    Frames are balanced over tasks and episodes; idle ones are dropped. The same command on the
    same source writes the same bytes.
    """
    heldout = None if heldout_episodes is None else _episode_numbers(heldout_episodes)
    selection = Selection(
        frames=frames,
        heldout_frames=heldout_frames,
        stride=stride,
        seed=seed,
        min_motion=min_motion,
    )
    opened = of_tasks(open_set(source, heldout=heldout), tasks)
    with progress_bar() as progress:
        built = build_set(
            opened,
            output,
            selection=selection,
            name=name,
            image_format=image_format,
            overwrite=overwrite,
            progress=lambda done, total: progress("writing frames", done, total),
        )
    _report_missing(built, selection)
    _print_summary(Console(), summarize(built, output))


@calib.command("record")
@click.option("--env", type=click.Choice(["metaworld"]), required=True, help="The simulator.")
@click.option("--tasks", default="all", show_default=True, help="Task names, separated by commas.")
@click.option("--episodes", type=click.IntRange(1), default=5, show_default=True, help="Per task.")
@click.option(
    "--stride", type=click.IntRange(1), default=8, show_default=True, help="Record every N-th step."
)
@click.option(
    "--noise",
    type=click.FloatRange(0, 1),
    default=0.15,
    show_default=True,
    help="Scale of the noise added to the expert's actions, as a policy's errors would.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--format", "image_format", type=_FORMAT, default="jpeg", show_default=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="New set.")
@click.option("--overwrite", is_flag=True, help="Replace an existing set.")
def record_command(
    env: str,
    tasks: str,
    episodes: int,
    stride: int,
    noise: float,
    seed: int,
    image_format: ImageFormat,
    output: Path,
    overwrite: bool,
) -> None:
    """Record scripted experts in a simulator; on a robot use quantvla.calib_sets.Recorder.

    Episodes that the expert does not solve are left out.
    """
    from quantvla.cli.demonstrations import DemonstrationPlan, demonstrations, describe_simulator

    plan = DemonstrationPlan.parse(tasks, episodes=episodes, stride=stride, noise=noise, seed=seed)
    with progress_bar() as progress:
        shown = _counted(progress, demonstrations(plan), len(plan.tasks) * episodes)
        recorded = record(
            ((frame.observation, frame.episode, frame.frame) for frame in shown),
            output,
            source=describe_simulator(env, plan),
            image_format=image_format,
            overwrite=overwrite,
        )
    _print_summary(Console(), summarize(recorded, output))


def _counted(
    progress: Progress, frames: Iterator[Demonstration], total: int
) -> Iterator[Demonstration]:
    for frame in frames:
        progress("recording episodes", frame.episode, total)
        yield frame
    progress("recording episodes", total, total)


def _episode_numbers(text: str) -> frozenset[int]:
    """Return the numbers of a list such as ``80-83,90``."""
    numbers: set[int] = set()
    for item in text.split(","):
        first, _, last = item.strip().partition("-")
        try:
            numbers.update(range(int(first), int(last or first) + 1))
        except ValueError as error:
            raise explain(
                "--heldout-episodes",
                "must be numbers and ranges",
                got=repr(item),
                remedy="write 80-83,90",
            ) from error
    return frozenset(numbers)


def _report_missing(built: CalibrationSet, selection: Selection) -> None:
    """Say on stderr when the source had fewer frames than were asked for."""
    asked: dict[Part, int] = {
        "calibration": selection.frames,
        "heldout": selection.heldout_frames,
    }
    for part, count in asked.items():
        found = len(built.part(part))
        if found < count:
            click.echo(
                f"{part}: {count} frames asked, the source has {found} moving ones "
                f"at stride {selection.stride}",
                err=True,
            )


def _print_summary(console: Console, summary: Summary) -> None:
    origin = f"{summary.name} from {summary.source.kind}: {summary.source.name}"
    console.print(origin, highlight=False, soft_wrap=True)
    table = Table()
    table.add_column("task")
    for part in summary.parts:
        table.add_column(part, justify="right")
    parts = list(summary.parts.values())
    for task in parts[0].tasks:
        table.add_row(task, *(str(part.tasks[task]) for part in parts))
    table.add_section()
    table.add_row("frames", *(str(part.frames) for part in parts))
    table.add_row("episodes", *(str(part.episodes) for part in parts))
    table.add_row("moving frames", *(f"{part.moving:.0%}" for part in parts))
    console.print(table)
    for camera in summary.robot.cameras:
        console.print(
            f"camera {camera.key}: {camera.height}x{camera.width}", highlight=False, soft_wrap=True
        )
    for label, vector in (("state", summary.robot.state), ("action", summary.robot.action)):
        if vector is not None:
            names = f" ({', '.join(vector.names)})" if vector.names else ""
            console.print(
                f"{label} {vector.key}: {vector.dim}{names}", highlight=False, soft_wrap=True
            )
    console.print(f"parts: {summary.split.detail}", highlight=False, soft_wrap=True)
    console.print(
        f"size {summary.size_bytes / 1e6:.2f} MB, checksum {summary.checksum}",
        highlight=False,
        soft_wrap=True,
    )
    for note in summary.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
