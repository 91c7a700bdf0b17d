"""What `plan` and `export` share for GPU targets: the options, the plan, the calibration of input scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from quantvla.calib_sets import check_robot, limit, open_set
from quantvla.calib_sets.bundled import bundled_set
from quantvla.calibrate import collect_statistics
from quantvla.cli.options import is_given
from quantvla.export.source import SourcePolicy, load_source
from quantvla.export.tensorrt_engine import export_tensorrt, static_sites
from quantvla.families.base import LoadedPolicy
from quantvla.layout import make_plan
from quantvla.plan import Plan
from quantvla.progress import Progress
from quantvla.recipe import Default, Recipe
from quantvla.runtime.errors import explain
from quantvla.runtime.manifest import Manifest
from quantvla.runtime.site_formats import SiteFormat, read_formats
from quantvla.runtime.targets import Board, board_named, boards_of, target_named
from quantvla.site_tokens import count_site_tokens, sites_of_time
from quantvla.statistics import SiteStatistics
from quantvla.target_plan import ACTIVATIONS, EMBEDDINGS, PRECISIONS, TargetPlan, plan_target


@dataclass(frozen=True)
class GpuOptions:
    """Options of a GPU target; ``board`` None is the target's first."""

    target: str
    board: str | None
    activations: str
    precision: str
    embedding: str = "half"


def gpu_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --board, --activations, --precision and --embedding to a command."""
    for option in (
        click.option("--embedding", default="half", show_default=True,
                     help=f"GPU targets: format of the token embedding ({', '.join(EMBEDDINGS)})."),
        click.option("--precision", default="auto", show_default=True,
                     help=f"GPU targets: format of quantized linears ({', '.join(PRECISIONS)})."),
        click.option("--activations", default="fp16", show_default=True,
                     help=f"GPU targets: format between them ({', '.join(ACTIVATIONS)})."),
        click.option("--board", help="GPU targets: board to plan for (see `quantvla targets`)."),
    ):  # fmt: skip
        command = option(command)
    return command


def refuse_gpu_options(where: str, *others: str) -> None:
    """Raise for an option of `gpu_options`, or one of ``others``, that was given where no GPU is planned for."""
    for name in ("board", "activations", "precision", "embedding", *others):
        if is_given(name):
            raise explain(
                f"--{name}", "is for GPU targets", got=where,
                remedy="give one of `quantvla targets` as --target, or leave it out",
            )  # fmt: skip


def plan_for_gpu(loaded: LoadedPolicy, plan: Plan | None, options: GpuOptions) -> TargetPlan:
    """Return what every linear runs in; ``plan`` None is a float checkpoint's."""
    board: Board = board_named(options.board) if options.board else boards_of(options.target)[0]
    return plan_target(
        plan or make_plan(loaded.sites, _FLOAT), count_site_tokens(loaded), target_named(options.target),
        board, activations=options.activations, precision=options.precision,
        embedding=options.embedding,
        tables=dict.fromkeys(sites_of_time(loaded), len(loaded.interface.sampler.timesteps)),
    )  # fmt: skip


_FLOAT = Recipe(
    name="float", rules=(), default=Default(scheme="float", reason="float checkpoint"), passes=()
)


def export_for_gpu(
    checkpoint: Path, options: GpuOptions, output: Path, *, calib: Path | None, frames: int, seed: int,
    overwrite: bool, progress: Progress,
) -> tuple[Manifest, tuple[SiteFormat, ...]]:  # fmt: skip
    """Plan, calibrate input scales where the plan needs them, and write the engine.

    Returns its manifest, and the linears that do not run in what was planned before calibration.
    """
    if output.exists() and not overwrite:
        raise explain(output, "already exists", remedy="choose another output or pass --overwrite")
    source = load_source(checkpoint)
    plan = plan_for_gpu(source.loaded, source.plan, options)
    statistics = _calibrate(source, plan, calib, frames, seed, progress)
    manifest = export_tensorrt(
        source, plan, statistics, output, overwrite=overwrite, progress=progress
    )
    planned = {entry.site: entry.format for entry in plan.entries}
    sites = read_formats(output).sites
    return manifest, tuple(site for site in sites if site.format != planned[site.site])


def _calibrate(
    source: SourcePolicy,
    plan: TargetPlan,
    calib: Path | None,
    frames: int,
    seed: int,
    progress: Progress,
) -> dict[str, SiteStatistics]:
    sites = static_sites(plan)
    if not sites:
        return {}
    interface = source.loaded.interface
    found = open_set(calib) if calib else bundled_set(interface.cameras, interface.state)
    chosen = limit(found, frames=frames, seed=seed).part("calibration")
    check_robot(chosen.robot, interface.cameras, interface.state, where=chosen.card.name)
    with TemporaryDirectory() as journal:
        return collect_statistics(
            source.loaded, sites, chosen, seed=seed, journal=Path(journal), progress=progress
        )
