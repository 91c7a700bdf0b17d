"""The one table of a report: measures down, arms across. The terminal and the HTML page show the same cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table

from quantvla.evaluate.results import ArmResult, PairResult, TaskResult
from quantvla.report.structure import ArmReport, Latency, Report

ABSENT = "-"
_MB = 1e6


@dataclass(frozen=True)
class Row:
    """One measure and its cell for every arm, in the report's order."""

    measure: str
    cells: tuple[str, ...]


def summary_rows(report: Report) -> tuple[Row, ...]:
    """Return the rows that have a value for at least one arm."""
    stages = stage_names(report.arms)
    measures: list[tuple[str, Callable[[ArmReport], str]]] = [
        ("Success in closed loop", lambda arm: _success(arm.success)),
        ("Difference to the reference", lambda arm: _difference(report, arm)),
        ("Action error, relative RMS", _nrmse),
        ("Action cosine: mean / p5 / min", _cosine),
        ("Difference to lerobot, same weights", _lowering),
        ("Difference of a kernel to its reference, relative", _kernel),
        ("Chunk latency p50 / p99", lambda arm: format_latency(arm.chunk_ms)),
        *((_stage_title(report, s), _stage_cell(s)) for s in stages),
        ("Quantized parts, scales counted", _parts),
        ("Files of policy or engine", _files),
        ("Resident / peak memory", _resident),
    ]
    rows = (Row(title, tuple(cell(arm) for arm in report.arms)) for title, cell in measures)
    return tuple(row for row in rows if set(row.cells) != {ABSENT})


def stage_names(arms: Sequence[ArmReport]) -> tuple[str, ...]:
    """Return all stages in the order in which the most finely measured arm runs them."""
    by_detail = sorted(arms, key=lambda arm: -len(arm.stages_ms))
    return tuple(dict.fromkeys(stage for arm in by_detail for stage in arm.stages_ms))


def summary_table(report: Report) -> Table:
    """Return the summary for the terminal."""
    table = Table(title=report.title)
    table.add_column("")
    for arm in report.arms:
        table.add_column(arm.title, justify="right")
    for row in summary_rows(report):
        table.add_row(row.measure, *row.cells)
    return table


def format_rate(result: ArmResult | TaskResult) -> str:
    """Return ``17/20 85 % [64-95]``: successes, rate and its 95 % interval in percent."""
    low, high = result.ci95
    share = f"{result.successes}/{result.episodes}"
    return f"{share}  {100 * result.rate:.0f} % [{100 * low:.0f}-{100 * high:.0f}]"


def format_difference(pair: PairResult) -> str:
    """Return ``-1.1 points [-3.0 to +0.8], p 0.38``: rate(b) - rate(a), interval, McNemar."""
    low, high = pair.ci95
    interval = f"[{100 * low:+.1f} to {100 * high:+.1f}]"
    return f"{100 * pair.difference:+.1f} points {interval}, p {pair.mcnemar_p:.2f}"


def format_latency(latency: Latency | None) -> str:
    """Return ``12.3 / 15.0 ms``."""
    return ABSENT if latency is None else f"{latency.p50:.2f} / {latency.p99:.2f} ms"


def format_bytes(count: int) -> str:
    """Return decimal megabytes."""
    return f"{count / _MB:.2f} MB"


def _success(result: ArmResult | None) -> str:
    return ABSENT if result is None else format_rate(result)


def _difference(report: Report, arm: ArmReport) -> str:
    reference = report.arms[0].name
    found = [pair for pair in report.pairs if (pair.a, pair.b) == (reference, arm.name)]
    return format_difference(found[0]) if found else ABSENT


def _nrmse(arm: ArmReport) -> str:
    return ABSENT if arm.action_error is None else f"{100 * arm.action_error.nrmse:.2g} %"


def _lowering(arm: ArmReport) -> str:
    value = None if arm.action_error is None else arm.action_error.lowering_max_abs
    return ABSENT if value is None else f"{value:.1e}"


def _kernel(arm: ArmReport) -> str:
    value = None if arm.action_error is None else arm.action_error.kernel_max_relative
    return ABSENT if value is None else f"{value:.1e}"


def _cosine(arm: ArmReport) -> str:
    error = arm.action_error
    if error is None:
        return ABSENT
    return f"{error.cosine_mean:.5f} / {error.cosine_p5:.5f} / {error.cosine_min:.5f}"


def _stage_title(report: Report, stage: str) -> str:
    repeat = max(a.stages_ms[stage].repeat for a in report.arms if stage in a.stages_ms)
    return f"    {stage}, each of {repeat} calls" if repeat > 1 else f"    {stage}"


def _stage_cell(stage: str) -> Callable[[ArmReport], str]:
    return lambda arm: format_latency(arm.stages_ms.get(stage))


def _parts(arm: ArmReport) -> str:
    if arm.memory is None:
        return ABSENT
    change = arm.memory.quantized_parts / arm.memory.quantized_parts_float16 - 1
    return f"{format_bytes(arm.memory.quantized_parts)} ({100 * change:+.1f} % vs FP16)"


def _files(arm: ArmReport) -> str:
    return ABSENT if arm.memory is None else format_bytes(arm.memory.files)


def _resident(arm: ArmReport) -> str:
    if arm.memory is None or arm.memory.resident_mb is None:
        return ABSENT
    peak = "" if arm.memory.peak_rss_mb is None else f" / {arm.memory.peak_rss_mb:.0f}"
    return f"{arm.memory.resident_mb:.0f}{peak} MB"
