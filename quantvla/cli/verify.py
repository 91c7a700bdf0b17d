"""``quantvla verify``: engine against float policy; exit code 0 pass, 1 fail, 2 error."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from quantvla.calib_sets import limit, open_set
from quantvla.calib_sets.bundled import bundled_set
from quantvla.cli import options
from quantvla.cli.progress import progress_bar
from quantvla.fidelity.action_error import SWITCHED
from quantvla.runtime.manifest import read_manifest
from quantvla.verify import verify as run_verification
from quantvla.verify_report import Thresholds, VerifyReport

FAILED = 1
_CHUNK_LIMITS = {"kernel_share": "share", "kernel": "RMS", "rounding": "rounding"}


@click.command()
@click.argument("engine", type=options.DIRECTORY)
@options.policy_path
@click.option(
    "--calib",
    type=options.DIRECTORY,
    help="Set whose held-out part is used.  [default: the bundled set of this robot]",
)
@click.option("--frames", default=64, show_default=True, help="Held-out frames to use at most.")
@click.option(
    "--float-engine",
    type=options.DIRECTORY,
    help="Float engine for the parity part.  [default: exported to a temporary directory]",
)
@click.option(
    "--quantized",
    type=options.DIRECTORY,
    help="Quantized checkpoint the engine was exported from, to compare whole chunks with reference arithmetic.",
)
@click.option(
    "--parity-threshold",
    default=1e-4,
    show_default=True,
    help="Largest action error of the float engine.",
)
@click.option(
    "--kernel-threshold",
    default=1e-3,
    show_default=True,
    help="Largest relative error of an integer kernel.",
)
@click.option(
    "--cosine-threshold",
    default=0.98,
    show_default=True,
    help="Least mean cosine against the float policy.",
)
@options.seed
@options.as_json
def verify(
    engine: Path, policy_path: Path, calib: Path | None, frames: int, float_engine: Path | None,
    quantized: Path | None, parity_threshold: float, kernel_threshold: float, cosine_threshold: float, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Compare ENGINE with the policy it was made from, on held-out observations and shared noise."""
    manifest = read_manifest(engine)
    source = open_set(calib) if calib else bundled_set(manifest.cameras, manifest.state)
    heldout = limit(source, heldout_frames=frames, seed=seed).part("heldout")
    with progress_bar() as progress:
        report = run_verification(
            engine, policy_path, heldout, float_engine=float_engine, quantized=quantized, seed=seed,
            progress=progress,
            thresholds=Thresholds(parity_threshold, kernel_threshold, cosine_mean=cosine_threshold),
        )  # fmt: skip
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(report), indent=1))
    else:
        _print(report)
    sys.exit(0 if report.passed else FAILED)


def _chunk_row(report: VerifyReport) -> tuple[str, str, str]:
    kernel, limits, kept = report.kernel, report.thresholds, report.chunk_limits_kept
    if kernel.chunk_nrmse is None:
        return "  whole chunks", "not compared (--quantized not given)", ""
    if kernel.share is None or kept is None:
        return "  whole chunks: relative RMS", f"{kernel.chunk_nrmse:.1e}", ""
    within = " and ".join(_CHUNK_LIMITS[name] for name in kept) or "none"
    return (
        "  whole chunks: relative RMS / its share of the quantization error",
        f"{kernel.chunk_nrmse:.2%} / {kernel.share:.1%}",
        f"{limits.kernel:.1%}, {limits.kernel_share:.0%} or as below, kept: {within}",
    )


def _kernel_rows(table: Table, report: VerifyReport, max_abs: float) -> None:
    table.add_row(
        "kernel: integer kernels against reference, same input, max"
        if report.integer_sites
        else "kernel: no integers; whole chunks against PyTorch, max abs",
        f"{max_abs:.2e}",
        f"{report.thresholds.kernel:.0e}",
    )
    kernel, limits = report.kernel, report.thresholds
    if kernel.attention_max_abs is not None:
        table.add_row(
            "  attentions against reference, same input, max",
            f"{kernel.attention_max_abs:.2e}", f"{limits.attention:.1e}",
        )  # fmt: skip
    table.add_row(*_chunk_row(report))
    if kernel.bfloat16_nrmse is not None:
        table.add_row(
            "  (these with float32 attention; bfloat16 attention changes whole chunks by)",
            f"{kernel.bfloat16_nrmse:.2%}", "",
        )  # fmt: skip
    if kernel.velocity_nrmse is not None and kernel.rounding_nrmse is not None:
        table.add_row(
            "  velocities at the reference's states / the engine's own, inputs changed in the last bits",
            f"{kernel.velocity_nrmse:.2%} / {kernel.rounding_nrmse:.2%}",
            f"{limits.rounding:g} times the second",
        )


def _print(report: VerifyReport) -> None:
    error, limits = report.quantization, report.thresholds
    table = Table(title=f"{report.frames} held-out frames of {report.set}, seed {report.seed}")
    for column in ("what", "value", "limit"):
        table.add_column(column)
    table.add_row(
        "parity: float engine against lerobot, max abs",
        f"{report.parity.max_abs:.2e}",
        f"{limits.parity:.0e}",
    )
    if report.loop is not None:
        table.add_row(
            "loop: all steps in one call against step by step",
            f"{report.loop:.2e}",
            f"{limits.parity:.0e}",
        )
    if report.kernel.max_abs is None:
        table.add_row("kernel: TensorRT's, not run; the graphs by ONNX Runtime, unfused", "", "")
    else:
        _kernel_rows(table, report, report.kernel.max_abs)
    table.add_row("quantization: cosine, mean", f"{error.cosine_mean:.5f}", f"{limits.cosine_mean}")
    table.add_row(
        "quantization: cosine, 5th percentile / min",
        f"{error.cosine_p5:.5f} / {error.cosine_min:.5f}",
        "",
    )
    table.add_row(
        "quantization: relative action error, whole chunk / executed steps",
        f"{error.nrmse:.3%} / {error.nrmse_executed:.3%}",
        "",
    )
    table.add_row(
        f"  median chunk / chunks that err by more than {SWITCHED:.0%}",
        f"{error.nrmse_median:.3%} / {error.switched:.1%}",
        "",
    )
    if error.gripper_flips is not None:
        table.add_row("  gripper on the other side", f"{error.gripper_flips:.2%} of steps", "")
    table.add_row(
        "  per action dimension", " ".join(f"{v:.2%}" for v in error.nrmse_per_dimension), ""
    )
    table.add_row(
        "  velocity by step, teacher-forced",
        " ".join(f"{v:.1%}" for v in error.velocity_teacher_forced),
        "",
    )
    table.add_row(
        "  velocity by step, free-running",
        " ".join(f"{v:.1%}" for v in error.velocity_free_running),
        "",
    )
    if report.schedule_nrmse is not None:
        table.add_row(
            "schedule: float policy at the engine's times against its own",
            f"{report.schedule_nrmse:.3%}",
            "",
        )
    if report.integer_sites:
        saved = 1 - report.integer_bytes / report.half_bytes
        table.add_row(
            "memory of the quantized parts", f"{report.integer_bytes / 2**20:.2f} MiB, {saved:.1%} less than fp16",
            f"{report.integer_sites} sites",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(
        "[green]pass[/]" if report.passed else f"[red]fail: {', '.join(report.failed)}[/]"
    )
