"""``quantvla plan --budget-mb/--budget-ms``: a format for every linear, within a budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.table import Table

from quantvla.calib_sets import open_set
from quantvla.cli import options
from quantvla.cli.progress import progress_bar
from quantvla.families import load_policy
from quantvla.latency_table import Kernel, LatencyTable, TableFile
from quantvla.layout import make_plan
from quantvla.mixed.cache import cache_directory
from quantvla.mixed.choose import MixedPlan, Point
from quantvla.mixed.figure import write_figure
from quantvla.mixed.make import Request, make_mixed_plan
from quantvla.mixed.offers import DEFAULT_FORMATS, parse_formats
from quantvla.mixed.profile import measure_missing, this_machine
from quantvla.mixed.recipe_file import write_mixed_recipe
from quantvla.mixed.sensitivity import open_subject
from quantvla.recipe import Recipe
from quantvla.runtime.errors import explain


@dataclass(frozen=True)
class Budgets:
    """The options of `plan` that belong to a budget."""

    budget_mb: float | None
    budget_ms: float | None
    calib: Path | None
    formats: tuple[str, ...]
    frames: int
    probe_frames: int
    with_latency: bool
    threads: int | None
    cache: Path | None
    output: Path | None
    plot: Path | None
    seed: int

    @property
    def given(self) -> bool:
        """Whether there is a budget. Raises `QuantVLAError` for options that make no sense without."""
        budget = self.budget_mb is not None or self.budget_ms is not None
        if not budget and (self.calib or self.output or self.plot or self.with_latency):
            raise explain(
                "quantvla plan",
                "--calib, --output, --plot and --latency belong to a budget",
                remedy="give --budget-mb or --budget-ms",
            )
        return budget


_POSITIVE = click.FloatRange(min=0, min_open=True)
_OPTIONS = (
    click.option("--budget-mb", type=_POSITIVE, help=(
        "MiB that the recipe's integer sites may take; their formats are chosen for least action error.")),
    click.option("--budget-ms", type=_POSITIVE, help=(
        "Milliseconds a chunk that the kernels of these sites may take on this machine.")),
    click.option("--calib", type=options.DIRECTORY, help="Calibration set; needed with a budget."),
    click.option("--format", "formats", multiple=True, default=DEFAULT_FORMATS, show_default=True,
                 help="A format on offer, scheme:block; may be given several times."),
    click.option("--frames", default=256, show_default=True, help="Calibration frames for statistics."),
    click.option("--probe-frames", type=click.IntRange(min=4), default=8, show_default=True,
                 help="Calibration frames on which each format at each site is tried out."),
    click.option("--latency/--no-latency", "with_latency", default=False, help=(
        "With --budget-mb alone, show kernel times too; those that have none yet are measured.")),
    options.threads,
    options.cache,
    click.option("-o", "--output", type=options.DIRECTORY, help="Recipe file to write (.toml)."),
    click.option("--plot", type=options.DIRECTORY, help="Picture of the frontier to write (.png)."),
    options.seed,
)  # fmt: skip


def budget_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of `Budgets` to a command, which gets them as its argument ``budget``."""
    names = {field.name for field in fields(Budgets)}

    @wraps(command)
    def gathered(**arguments: Any) -> None:
        mine = {name: arguments.pop(name) for name in names}
        command(**arguments, budget=Budgets(**mine))

    for option in reversed(_OPTIONS):
        gathered = option(gathered)
    return gathered


def plan_mixed(policy_path: Path, recipe: Recipe, budget: Budgets, *, as_json: bool) -> None:
    """Solve, print, and write the recipe and the picture."""
    if budget.output is not None and budget.output.suffix != ".toml":
        raise explain(budget.output, "a recipe's file ends in .toml", remedy="choose such a name")
    if budget.calib is None:
        raise explain("quantvla plan", "a budget needs calibration data", remedy="give --calib SET")
    formats = parse_formats(budget.formats)
    loaded = load_policy(policy_path)
    subject = open_subject(
        loaded, open_set(budget.calib), frames=budget.frames, probe_frames=budget.probe_frames,
        seed=budget.seed,
    )  # fmt: skip
    cache = budget.cache or cache_directory()
    with progress_bar() as progress:

        def profile(kernels: Sequence[Kernel]) -> LatencyTable:
            file = TableFile(cache, this_machine("cpu", budget.threads))
            return measure_missing(kernels, file, progress=progress)

        timed = budget.budget_ms is not None or budget.with_latency
        result = make_mixed_plan(
            subject,
            Request(
                make_plan(loaded.sites, recipe), formats, budget.budget_mb, budget.budget_ms,
                cache, profile if timed else None,
            ),
            progress,
        )  # fmt: skip
    if budget.output is not None:
        write_mixed_recipe(budget.output, recipe, result, loaded.sites)
    if budget.plot is not None:
        write_figure(budget.plot, result.plan)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(result.plan), indent=1))
    else:
        print_mixed(result.plan)


def print_mixed(plan: MixedPlan) -> None:
    """Print the frontier, what was chosen, and how predicted and measured errors compare."""
    console = Console(width=None if Console().is_terminal else 160)
    table = Table(title=f"best formats for each budget, sites of recipe {plan.base_recipe}")
    for column in ("choice", "MiB", "ms a chunk", "nrmse predicted", "nrmse measured"):
        table.add_column(column, justify="left" if column == "choice" else "right")
    for point in plan.frontier:
        _add(table, point, f"budget {point.name}")
    table.add_section()
    for point in plan.uniform:
        _add(table, point, f"all {point.name}")
    _add(table, plan.base, f"recipe {plan.base.name}")
    table.add_section()
    _add(table, plan.chosen, "chosen")
    console.print(table)
    chosen = Table(title="chosen formats")
    for column in ("part", "kind", "formats by layer"):
        chosen.add_column(column)
    for part, kind in dict.fromkeys((site.part, site.kind) for site in plan.sites):
        members = [s for s in plan.sites if (s.part, s.kind) == (part, kind)]
        chosen.add_row(part, kind, "  ".join(site.format for site in members))
    console.print(chosen)
    counts = Counter(site.format for site in plan.sites)
    console.print(
        f"{len(plan.sites)} sites: "
        + ", ".join(f"{count} {name}" for name, count in counts.most_common())
        + f"; errors from {plan.probe_frames} calibration frames of {plan.calibration}, paired noise"
        + (f"; kernels timed on {plan.machine}" if plan.machine else "")
    )
    for note in plan.notes:
        console.print(f"[yellow]note[/] {note}", highlight=False)


def _add(table: Table, point: Point, name: str) -> None:
    table.add_row(
        name, f"{point.mib:.3f}", "-" if point.latency_ms is None else f"{point.latency_ms:.2f}",
        f"{point.predicted_nrmse:.3%}",
        "-" if point.measured_nrmse is None else f"{point.measured_nrmse:.3%}",
    )  # fmt: skip
