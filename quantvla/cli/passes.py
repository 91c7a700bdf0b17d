"""What passes did, on the screen."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from quantvla.passes.base import PassReport


def print_passes(reports: Sequence[PassReport], console: Console) -> None:
    """Print one line a pass, its notes, and attention factors as a table."""
    for report in reports:
        console.print(pass_line(report), highlight=False)
        for note in report.notes:
            console.print(f"  {note}", highlight=False)
        if report.factors:
            console.print(factor_table(report))


def pass_line(report: PassReport) -> str:
    """Return what a pass did in one line."""
    if report.equivalence is not None:
        found = report.equivalence
        return (
            f"{report.kind}: {report.folds} folds, float actions unchanged on {found.frames} frames "
            f"(cosine at least {found.cosine_min:.7f}, largest difference {found.max_abs:.1e})"
        )
    if report.sites:
        worst = max(report.sites, key=lambda site: site.relative_output_error)
        return (
            f"{report.kind}: largest output error {worst.relative_output_error:.2%} at {worst.site}"
        )
    if not report.factors:
        return report.kind
    applied = [value for entry in report.factors for value in entry.applied]
    neutral = sum(value == 1 for value in applied)
    return f"{report.kind}: {len(applied)} factors, {neutral} of them neutral"


def factor_table(report: PassReport) -> Table:
    """Return the factors of a correction: measured, and applied after neutral band and clip."""
    table = Table(title=f"{report.kind}: neutral below ±{report.band}, clipped at e^±{report.clip}")
    for column in ("layer", "projection", "measured", "applied"):
        table.add_column(column, overflow="fold")
    for entry in report.factors:
        measured, applied = (
            " ".join(f"{value:.3f}" for value in values) for values in (entry.raw, entry.applied)
        )
        table.add_row(str(entry.layer), entry.site, measured, applied)
    return table
