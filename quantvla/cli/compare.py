"""``quantvla compare``: how far arms are from a reference, paired and in distribution."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from quantvla.calib_sets import CalibrationSet, limit, open_set
from quantvla.calib_sets.bundled import bundled_set
from quantvla.cli import options
from quantvla.cli.arm_arguments import parse_named_arms
from quantvla.cli.progress import progress_bar
from quantvla.evaluate.arms import Arm, identify_arm
from quantvla.fidelity.compare import ArmComparison, Comparison, ComparisonPlan, compare
from quantvla.fidelity.distribution import distances
from quantvla.fidelity.smoothness import Smoothness
from quantvla.runtime.files import write_atomic
from quantvla.runtime.manifest import CameraSpec, VectorSpec

RESULT_FILE, FIGURE_FILE, SAMPLES = "comparison.json", "comparison.png", "samples"


@click.command("compare")
@click.argument("arms", nargs=-1, required=True, metavar="[NAME=]DIRECTORY...")
@click.option(
    "--policy.path",
    "policy_path",
    type=options.DIRECTORY,
    help="LeRobot checkpoint to compare with.  [default: the first arm is the reference]",
)
@click.option(
    "--calib",
    "--set",
    "calib",
    type=options.DIRECTORY,
    help="Set whose held-out part is used.  [default: the bundled set of this robot]",
)
@click.option("--frames", default=64, show_default=True, help="Held-out frames to use at most.")
@click.option("--noises", default=32, show_default=True, help="Chunks drawn per frame.")
@click.option("--permutations", default=999, show_default=True, help="Permutations of the test.")
@click.option("--processes", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "-o",
    "--output",
    type=options.DIRECTORY,
    help=f"Directory for {RESULT_FILE}, {FIGURE_FILE} and the samples; the same command again resumes.",
)
@options.seed
@options.as_json
def command(
    arms: Sequence[str], policy_path: Path | None, calib: Path | None, frames: int, noises: int,
    permutations: int, processes: int, output: Path | None, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Compare ARMS (engines, LeRobot checkpoints, quantized checkpoints) with a reference.

    Every arm acts on the same held-out observations and the same noises. Checkpoints run in torch,
    a quantized one in the reference arithmetic of its integers.
    """
    named = parse_named_arms(arms)
    reference = identify_arm("float", policy_path) if policy_path else named[0]
    others = named if policy_path else named[1:]
    source = open_set(calib) if calib else _bundled(reference)
    heldout = limit(source, heldout_frames=frames, seed=seed).part("heldout")
    plan = ComparisonPlan(noises=noises, seed=seed, permutations=permutations, processes=processes)
    with progress_bar() as progress:
        result = compare(
            reference, others, heldout, plan,
            work=None if output is None else output / SAMPLES, progress=progress,
        )  # fmt: skip
    encoded = msgspec.json.format(msgspec.json.encode(result), indent=1)
    if output is not None:
        from quantvla.report.comparison import comparison_png

        write_atomic(output / RESULT_FILE, encoded + b"\n")
        write_atomic(output / FIGURE_FILE, comparison_png(result))
    if as_json:
        click.echo(encoded.decode())
    else:
        print_comparison(result, Console())


def _bundled(reference: Arm) -> CalibrationSet:
    """Return the bundled set with the reference's cameras and state (image sizes are not compared)."""
    contract = reference.contract
    cameras = [CameraSpec(key=key, height=1, width=1) for key in contract.cameras]
    return bundled_set(cameras, VectorSpec(key=contract.state_key, dim=contract.state_dim))


def print_comparison(result: Comparison, console: Console) -> None:
    """Print one row per arm, in three groups of columns."""
    title = f"{result.frames} held-out frames of {result.set}, {result.noises} noises each, seed {result.seed}"
    console.print(f"{title}; reference: {result.reference.name}")
    console.print(_paired(result))
    console.print(_by_dimension(result))
    console.print(_distribution(result))
    console.print(_motion(result))


def _paired(result: Comparison) -> Table:
    table = _arms_table(
        "Paired: same observation, same noise",
        ("error", "median", "switched", "executed", "cosine mean", "p5", "min"),
    )
    for name, arm in result.arms.items():
        error = arm.error
        cosines = (f"{v:.5f}" for v in (error.cosine_mean, error.cosine_p5, error.cosine_min))
        table.add_row(
            name, f"{error.nrmse:.2%}", f"{error.nrmse_median:.2%}", f"{error.switched:.1%}",
            f"{error.nrmse_executed:.2%}", *cosines,
        )  # fmt: skip
    return table


def _by_dimension(result: Comparison) -> Table:
    table = _arms_table("Paired error by dimension", (*result.dimensions, "gripper flips"))
    for name, arm in result.arms.items():
        error = arm.error
        flips = "-" if error.gripper_flips is None else f"{error.gripper_flips:.2%}"
        table.add_row(name, *(f"{value:.2%}" for value in error.nrmse_per_dimension), flips)
    return table


def _arms_table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("arm")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _distribution(result: Comparison) -> Table:
    first = next(iter(result.arms.values()))
    table = _arms_table(
        "Distribution: distance over the float-versus-float floor; p of a permutation test",
        [column for name, _ in distances(first.distribution) for column in (name, "p")],
    )
    for name, arm in result.arms.items():
        found = distances(arm.distribution)
        table.add_row(name, *(cell for _, d in found for cell in (f"{d.ratio:.3f}", f"{d.p:.3f}")))
    return table


def _motion(result: Comparison) -> Table:
    table = _arms_table(
        "Velocity error at the first and last denoise step; smoothness (normalized actions)",
        ("teacher-forced", "free-running", "jerk", "seam jump", "seams"),
    )
    for name, arm in result.arms.items():
        table.add_row(name, *_velocities(arm), *_smoothness_cells(arm.smoothness))
    reference = result.reference
    table.add_row(reference.name, "-", "-", *_smoothness_cells(reference.smoothness), style="dim")
    return table


def _velocities(arm: ArmComparison) -> tuple[str, str]:
    forced, free = arm.velocity_teacher_forced, arm.velocity_free_running
    return f"{forced[0]:.2%} .. {forced[-1]:.2%}", f"{free[0]:.2%} .. {free[-1]:.2%}"


def _smoothness_cells(found: Smoothness) -> tuple[str, str, str]:
    seam = "-" if found.seam is None else f"{found.seam:.4f}"
    return f"{found.jerk:.4f}", seam, str(found.seams)
