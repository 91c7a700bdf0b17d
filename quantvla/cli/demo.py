"""``quantvla demo``: the bundled policy through every step, to engines, a report and a film."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

import quantvla
from quantvla.cli import options
from quantvla.runtime.errors import explain

if TYPE_CHECKING:
    from quantvla.cli.demo_steps import Demo, DemoPlan
    from quantvla.report.structure import Report

FAILED = 1
TITLE = "SmolVLA on Meta-World: float policy, float engine, W4A8 engine"
CLONE = Path(quantvla.__file__).parent.parent
TITLES = {
    "float_policy": "Float policy (PyTorch)",
    "float": "Float engine",
    "w4a8": "W4A8 engine",
}


@click.command()
@click.option("--policy.path", "policy_path", type=options.DIRECTORY, help="[default: bundled]")
@click.option("--calib", type=options.DIRECTORY, help="Calibration set.  [default: bundled]")
@click.option(
    "-o", "--output", type=options.DIRECTORY, default=Path("build/demo"), show_default=True
)
@click.option("--episodes", default=10, show_default=True, help="Closed-loop episodes per task.")
@click.option("--frames", default=128, show_default=True, help="Calibration frames at most.")
@click.option("--processes", type=click.IntRange(min=1), help="Workers [default: all cores].")
@options.seed
def demo(
    policy_path: Path | None,
    calib: Path | None,
    output: Path,
    episodes: int,
    frames: int,
    processes: int | None,
    seed: int,
) -> None:
    """Quantize, export, verify, measure and run the bundled policy, and write a report.

    Every step shows the command that does the same. A second run reuses the steps whose inputs
    and code are unchanged; a killed one continues.
    """
    from quantvla.cli.demo_steps import DemoPlan
    from quantvla.evaluate.environment import MetaWorld

    MetaWorld().check_installed()
    plan = DemoPlan(
        checkpoint=policy_path or _bundled(CLONE / "examples" / "metaworld" / "policy"),
        calibration=calib or _bundled(CLONE / "calib_sets" / "metaworld"),
        directory=output,
        frames=frames,
        episodes=episodes,
        processes=processes,
        seed=seed,
    )
    if not run_demo(plan):
        sys.exit(FAILED)


def run_demo(plan: DemoPlan) -> bool:
    """Run all steps, write the report, print its table, and return whether both engines verified."""
    from quantvla.cli.demo_steps import Demo
    from quantvla.report.table import summary_table
    from quantvla.report.write import write_report

    run = Demo(plan)
    report, film, passed = _run_steps(run)
    page = write_report(report, plan.directory, film=film)
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    console.print(summary_table(report))
    for note in report.notes:
        console.print(note, markup=False)
    console.print(f"engines: {plan.directory / 'engines'}   report: {page}", markup=False)
    return passed


def _run_steps(run: Demo) -> tuple[Report, Path, bool]:
    from quantvla.report.assemble import Results, assemble_report

    quantized = run.quantize()
    engines = [
        run.export("float", run.plan.checkpoint, run.source).output_sha256,
        run.export("w4a8", run.quantized, quantized.output_sha256).output_sha256,
    ]
    verified = {name: run.verify(name, engines) for name in run.engines}
    benches = run.bench(engines)
    evaluation = run.evaluate(engines)
    examples = run.examples(engines)
    film = run.film(engines)
    passed = all(report.passed for report in verified.values())

    results = Results(
        checkpoint=run.plan.checkpoint,
        quantized=run.quantized,
        engines=run.engines,
        verified=verified,
        benches=benches,
        evaluation=evaluation,
        examples=examples,
        steps=tuple(run.steps.finished),
    )
    return assemble_report(TITLE, TITLES, results), film, passed


def _bundled(path: Path) -> Path:
    """Return a path in the clone, relative to the working directory where that is shorter."""
    if not path.is_dir():
        raise explain(
            path,
            "the demo's data is in the repository, which is not here",
            remedy="run the demo in a clone, or pass --policy.path and --calib",
        )
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
