"""The figures of docs/fidelity.md that are not those of `quantvla compare`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from arm_result import ArmRecord, Bed
from matplotlib.figure import Figure
from sweep import Sweep

from quantvla.report.comparison import plain_log_ticks
from quantvla.report.render import render_png

_BED_COLOURS = {"reference": "#3b82c4", "hard": "#e07b28"}
_GREY = "#8c8c8c"
LABEL_STEP = 1.14
"""The height of a label's line on the logarithmic axis of errors."""


def size_png(records: Sequence[ArmRecord]) -> bytes:
    """Return the paired action error against the bytes of the linears, one dot per arm."""
    return render_png(lambda: _size_figure(records))


def beds_png(records: Sequence[ArmRecord]) -> bytes:
    """Return success on both beds with Wilson's interval, one row per arm."""
    return render_png(lambda: _beds_figure(records))


def sweep_png(sweep: Sweep) -> bytes:
    """Return the float policy's success against the strength of every perturbation."""
    return render_png(lambda: _sweep_figure(sweep))


def _size_figure(records: Sequence[ArmRecord]) -> Figure:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    dots = _dots(records)
    for x, y, arm in dots:
        axes.plot(x, y, "o", color=_GREY if arm.simulated else "#3b82c4", fillstyle="none" if arm.simulated else "full")  # fmt: skip
    for (x, y), label in _labels(dots):
        axes.annotate(label, (x, y), xytext=(6, -2), textcoords="offset points", fontsize=7)
    axes.set_yscale("log")
    plain_log_ticks(axes.yaxis)
    axes.margins(x=0.3)
    axes.set_xlabel("all linears, MB, scales counted (float ones in half precision)")
    axes.set_ylabel("paired action error, relative RMS, %")
    axes.grid(which="both", alpha=0.5)
    return figure


def _dots(records: Sequence[ArmRecord]) -> list[tuple[float, float, ArmRecord]]:
    """Return (MB, error in percent, arm), smallest error first."""
    found = [
        (record.size.linear_bytes / 1e6, 100 * record.compared.result.error.nrmse, record)
        for record in records
        if record.size is not None and record.compared is not None and record.compared.result
    ]
    return sorted(found, key=lambda dot: dot[1])


def _labels(
    dots: Sequence[tuple[float, float, ArmRecord]],
) -> list[tuple[tuple[float, float], str]]:
    """Return where each name stands: arms of one point share a label, labels one above the other keep a line apart."""
    points: dict[tuple[float, float], list[str]] = {}
    for x, y, arm in dots:
        points.setdefault((x, y), []).append(arm.arm)
    labels, highest = [], dict[float, float]()
    for (x, y), names in points.items():
        column = round(x, 1)
        y = max(y, highest.get(column, 0.0) * LABEL_STEP)
        highest[column] = y
        labels.append(((x, y), ", ".join(names)))
    return labels


def _beds_figure(records: Sequence[ArmRecord]) -> Figure:
    rows = [record for record in records if record.beds]
    figure = Figure(figsize=(8, 0.42 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    for (name, colour), offset in zip(_BED_COLOURS.items(), (-0.14, 0.14), strict=True):
        labelled = False
        for row, record in enumerate(rows):
            bed = record.beds.get(name)
            if bed is None:
                continue
            rate, low, high = _rates(bed)
            axes.errorbar(
                rate, row + offset, xerr=[[rate - low], [high - rate]], fmt="o", markersize=4,
                capsize=2.5, color=colour, label=None if labelled else f"{name} tasks",
            )  # fmt: skip
            labelled = True
        first = rows[0].beds.get(name)
        if first is not None:
            axes.axvline(_rates(first)[0], color=colour, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(rows)), [record.arm for record in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("success, % (dotted: the float policy)")
    axes.grid(axis="x")
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=8)
    return figure


def _sweep_figure(sweep: Sweep) -> Figure:
    kinds = list(dict.fromkeys(rung.kind for rung in sweep.rungs))
    figure = Figure(figsize=(2.4 * len(kinds) + 0.8, 2.6), layout="constrained")
    plain = [sweep.plain[task] for task in sweep.bed.tasks]
    start = 100 * sum(r.successes for r in plain) / sum(r.episodes for r in plain)
    for axes, kind in zip(
        np.atleast_1d(figure.subplots(1, len(kinds), sharey=True)), kinds, strict=True
    ):
        rungs = [rung for rung in sweep.rungs if rung.kind == kind]
        labels = ["none", *(f"{rung.strength:g}" for rung in rungs)]
        rates = [start, *(100 * rung.success.rate for rung in rungs)]
        axes.plot(range(len(rates)), rates, "o-", color="#3b82c4", markersize=4)
        axes.axhline(100 * sweep.master, color=_GREY, linewidth=1, linestyle="--")
        axes.set_xticks(range(len(labels)), labels, fontsize=7)
        axes.set_title("denoise steps" if kind == "steps" else kind, fontsize=9)
        axes.set_ylim(-3, 103)
        axes.grid(axis="y")
    figure.supylabel("float policy's success, %", fontsize=9)
    return figure


def _rates(bed: Bed) -> tuple[float, float, float]:
    low, high = bed.success.ci95
    return 100 * bed.success.rate, 100 * low, 100 * high
