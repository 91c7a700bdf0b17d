"""``quantvla export``: checkpoint -> engine directory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import get_args

import click
from rich.console import Console

from quantvla.cli import options
from quantvla.cli.progress import progress_bar
from quantvla.cli.target_options import GpuOptions, export_for_gpu, gpu_options, refuse_gpu_options
from quantvla.export.engine import TARGETS, export_engine
from quantvla.export.kernel_choice import Wanted
from quantvla.export.rewrite_report import REWRITES_FILE, read_rewrites
from quantvla.latency_table import LatencyTable, TableFile
from quantvla.mixed.cache import cache_directory
from quantvla.mixed.profile import this_machine
from quantvla.runtime.errors import explain, nearest
from quantvla.runtime.site_formats import SiteFormat, read_formats
from quantvla.runtime.targets import TARGETS as GPU_TARGETS
from quantvla.schedule import read_schedule

_NOT_ON_GPU = {
    "guidance": "has no guidance graph; guidance 'prefix' and 'forward' need none",
    "schedule": "has the policy's own equal steps in its graphs",
    "cameras_apart": "runs all cameras in one call",
    "kernels": "runs TensorRT's kernels",
    "threads": "runs TensorRT's kernels",
    "cache": "runs TensorRT's kernels",
}
"""Why an option means nothing to a GPU target."""


def _refuse_cpu_options(target: str) -> None:
    for name, why in _NOT_ON_GPU.items():
        if options.is_given(name):
            raise explain(
                f"target {target}", why, remedy=f"leave --{name.replace('_', '-')} out"
            )  # fmt: skip


def _profile(target: str, threads: int | None, cache: Path | None) -> LatencyTable:
    """Return what was measured on this machine, empty if nothing; raises `QuantVLAError` for another machine's."""
    return TableFile(cache or cache_directory(), this_machine(target, threads)).read()


@click.command()
@click.argument("checkpoint", type=options.DIRECTORY)
@click.option(
    "--target", default="cpu", show_default=True, help=f"Where it runs: {', '.join((*TARGETS, *GPU_TARGETS))}.",
)  # fmt: skip
@click.option(
    "--guidance",
    is_flag=True,
    help="Add the graph for real-time chunking with guidance 'vjp' (target cpu).",
)
@gpu_options
@click.option(
    "--calib", type=options.DIRECTORY,
    help="Set whose calibration part gives int8, fp8 and nvfp4 inputs their scales.  [default: the bundled set of this robot]",
)  # fmt: skip
@click.option(
    "--frames",
    default=128,
    show_default=True,
    help="GPU targets: calibration frames for input scales, at most.",
)
@click.option(
    "--schedule", type=options.DIRECTORY, help="Times of the denoise steps, from `quantvla schedule` (target cpu).",
)  # fmt: skip
@click.option(
    "--cameras-apart", is_flag=True, help="Run vision once a camera, so that unchanged ones can be left out (target cpu).",
)  # fmt: skip
@click.option(
    "--kernels", type=click.Choice(get_args(Wanted)), default="auto", show_default=True,
    help="Target cpu: what computes integer linears. auto: for each the fastest that `quantvla profile` measured here, "
    "own ones where it measured none; own: the project's; onnxruntime: its operators only.",
)  # fmt: skip
@click.option(
    "--threads", type=click.IntRange(min=1),
    help="Target cpu: threads that kernels were profiled with.  [default: one per physical core]",
)  # fmt: skip
@options.cache
@options.seed
@options.output
@options.overwrite
def export(
    checkpoint: Path, target: str, guidance: bool, board: str | None, activations: str, precision: str,
    embedding: str, calib: Path | None, frames: int, schedule: Path | None, cameras_apart: bool,
    kernels: Wanted, threads: int | None, cache: Path | None, seed: int, output: Path, overwrite: bool,
) -> None:  # fmt: skip
    """Export CHECKPOINT as an engine: a quantized one, or a LeRobot one for the float engine."""
    known = (*TARGETS, *GPU_TARGETS)
    if target not in known:
        raise explain(f"target {target!r}", "unknown", remedy=nearest(target, known))
    changed: tuple[SiteFormat, ...] = ()
    with progress_bar() as progress:
        if target in GPU_TARGETS:
            _refuse_cpu_options(target)
            chosen = GpuOptions(target, board, activations, precision, embedding)
            manifest, changed = export_for_gpu(
                checkpoint, chosen, output, calib=calib, frames=frames, seed=seed, overwrite=overwrite,
                progress=progress,
            )  # fmt: skip
        else:
            refuse_gpu_options(f"--target {target}", "calib", "frames")
            manifest = export_engine(
                checkpoint,
                target,
                output,
                overwrite=overwrite,
                guidance=guidance,
                schedule=None if schedule is None else read_schedule(schedule),
                one_camera=cameras_apart,
                kernels=kernels,
                profile=_profile(target, threads, cache) if kernels == "auto" else None,
                progress=progress,
            )
    size = sum(path.stat().st_size for path in output.iterdir())
    console = Console(stderr=True)
    console.print(
        f"wrote {output}: {manifest.recipe} for {target}, {len(manifest.stages)} graphs, {size / 2**20:.1f} MiB"
    )
    for table in read_formats(output).embeddings if target in GPU_TARGETS else ():
        console.print(
            f"{table.table}: {table.format}, {table.half_bytes / 2**20:.2f} -> {table.bytes / 2**20:.2f} MiB"
        )
    for site in changed:
        console.print(f"{site.site}: {site.format}, {site.reason}")
    if (chosen_kernels := manifest.kernels) is not None:
        counts = Counter(site.operator for site in chosen_kernels.sites)
        console.print(
            f"integer linears: {', '.join(f'{n} {name}' for name, n in counts.items())}; "
            + (
                f"profile of {chosen_kernels.profile}"
                if chosen_kernels.profile
                else "no profile used"
            )
            + " (`quantvla inspect` says why)"
        )
    for stage in read_rewrites(output):
        if stage.unfused_attention:
            console.print(
                f"[yellow]warning[/] stage {stage.stage}: {len(stage.unfused_attention)} attentions run as exported, "
                f"which is slower ({', '.join(stage.unfused_attention[:3])}); see {output / REWRITES_FILE}"
            )
