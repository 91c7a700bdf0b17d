"""The figure of a comparison: all arms in four panels, one file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from quantvla.fidelity.compare import ArmComparison, Comparison
from quantvla.fidelity.distribution import distances
from quantvla.report.render import render_png

SIGNIFICANT = 0.05
WIDE = 5.0
"""Values that differ by more are drawn on a logarithmic axis."""
SMOOTH_SPAN = 0.05
"""The smoothness axis shows at least this much on both sides of 1, so that nothing is not drawn large."""
_COLOURS = (
    "#3b82c4", "#e07b28", "#3a9e6e", "#a765b8", "#c94f4f", "#7a6a53",
    "#d07fb0", "#6f7d8c", "#a8a02b", "#37a6b8", "#1f4e79", "#9c5518",
    "#16633f", "#6b2d7a", "#f0b429",
)  # fmt: skip
LEGEND_ARMS = 6
"""With more arms the velocity panel has no legend of its own: the bars above it show every arm's colour."""
_DISTANCE_COLOURS = ("#3b82c4", "#e07b28", "#3a9e6e")


def comparison_png(result: Comparison) -> bytes:
    """Return the figure as a PNG file's bytes."""
    return render_png(lambda: comparison_figure(result))


def comparison_figure(result: Comparison) -> Figure:
    """Return paired error, distribution ratio, velocity error by denoise step, and smoothness."""
    rows = len(result.arms)
    figure = Figure(figsize=(11, 4.2 + 0.5 * rows), layout="constrained")
    (error, ratio), (velocity, smooth) = figure.subplots(2, 2)
    _draw_error(error, result)
    _draw_ratio(ratio, result)
    _draw_velocity(velocity, result)
    _draw_smoothness(smooth, result)
    figure.suptitle(
        f"{result.frames} held-out frames of {result.set}, {result.noises} noises each; "
        f"reference: {result.reference.name}",
        fontsize=10,
    )
    return figure


def _draw_error(axes: Axes, result: Comparison) -> None:
    """Draw a bar for the error of all chunks, a line across it for the median one's, and a mark for each dimension."""
    marks = "ovs^Dx+*"
    for row, (arm, colour) in enumerate(_coloured(result)):
        axes.barh(row, 100 * arm.error.nrmse, height=0.55, color=colour, alpha=0.75)
        axes.plot(
            100 * arm.error.nrmse_median, row, "|", color="#1f2328", markersize=13,
            markeredgewidth=2, label="median chunk" if row == 0 else None,
        )  # fmt: skip
        for index, value in enumerate(arm.error.nrmse_per_dimension):
            mark = marks[index % len(marks)]
            label = result.dimensions[index] if row == 0 else None
            axes.plot(100 * value, row, mark, color="#1f2328", markersize=4, fillstyle="none", label=label)  # fmt: skip
        highest = 100 * max(arm.error.nrmse, *arm.error.nrmse_per_dimension)
        axes.text(highest, row, f"   {100 * arm.error.nrmse:.2f} %", fontsize=7, va="center")
    _arm_rows(axes, result)
    errors = [
        100 * value
        for arm in result.arms.values()
        for value in (arm.error.nrmse, arm.error.nrmse_median)
    ]
    if min(errors) > 0 and max(errors) > WIDE * min(errors):
        axes.set_xscale("log")
        plain_log_ticks(axes.xaxis)
        axes.set_xlim(min(errors) / 2, 2 * axes.get_xlim()[1])
    else:
        axes.set_xlim(0, 1.12 * axes.get_xlim()[1])
    axes.set_xlabel("paired action error, relative RMS, % (marks: by dimension)")
    axes.legend(fontsize=7, frameon=False, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _draw_ratio(axes: Axes, result: Comparison) -> None:
    """Draw every distance's ratio to the float floor; filled where the test tells the arm from the float policy."""
    offsets = np.linspace(-0.22, 0.22, 3)
    for row, arm in enumerate(result.arms.values()):
        found = distances(arm.distribution)
        for (name, distance), offset, colour in zip(found, offsets, _DISTANCE_COLOURS, strict=True):
            certain = distance.p < SIGNIFICANT
            axes.plot(
                distance.ratio, row + offset, "o", color=colour, markersize=5,
                fillstyle="full" if certain else "none", label=name if row == 0 else None,
            )  # fmt: skip
            axes.text(
                distance.ratio, row + offset, f"  p {distance.p:.3f}", fontsize=6, va="center"
            )
    axes.axvline(1, color="#8c8c8c", linewidth=1)
    _arm_rows(axes, result)
    axes.margins(x=0.25)
    if max(d.ratio for arm in result.arms.values() for _, d in distances(arm.distribution)) > WIDE:
        axes.set_xscale("log")
        plain_log_ticks(axes.xaxis)
        axes.margins(x=0.12)
    axes.set_xlabel(f"distance / float-versus-float floor (filled: p < {SIGNIFICANT})")
    axes.legend(fontsize=7, frameon=False, loc="best")


def _draw_velocity(axes: Axes, result: Comparison) -> None:
    """Draw the velocity error by denoise step, free-running and teacher-forced."""
    for arm, colour, name in zip(
        result.arms.values(), _cycle(len(result.arms)), result.arms, strict=True
    ):
        steps = range(1, len(arm.velocity_free_running) + 1)
        axes.plot(steps, _percent(arm.velocity_free_running), color=colour, label=name)
        axes.plot(steps, _percent(arm.velocity_teacher_forced), "--", color=colour, linewidth=1)
    many = len(result.arms) > LEGEND_ARMS
    colours = "; colours as above" if many else ""
    axes.set_xlabel(f"denoise step (dashed: on the reference's trajectory{colours})")
    axes.set_ylabel("velocity error, relative RMS, %")
    if max(max(arm.velocity_free_running) for arm in result.arms.values()) > 0:
        axes.set_yscale("log")
        plain_log_ticks(axes.yaxis)
    axes.grid(axis="y")
    if not many:
        axes.legend(fontsize=7, frameon=False, ncols=2)


def _draw_smoothness(axes: Axes, result: Comparison) -> None:
    """Draw jerk, and the jump at seams where the frames have any, over the reference's."""
    floor = result.reference.smoothness
    for row, arm in enumerate(result.arms.values()):
        jerk = arm.smoothness.jerk / max(floor.jerk, 1e-12)
        axes.plot(jerk, row, "o", color="#3b82c4", label="jerk" if row == 0 else None)
        if arm.smoothness.seam is not None and floor.seam:
            seam = arm.smoothness.seam / floor.seam
            axes.plot(seam, row + 0.2, "s", color="#e07b28", label="seam jump" if row == 0 else None)  # fmt: skip
    axes.axvline(1, color="#8c8c8c", linewidth=1)
    _arm_rows(axes, result)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 1 - SMOOTH_SPAN), max(high, 1 + SMOOTH_SPAN))
    axes.set_xlabel("over the reference's (1: as smooth)")
    axes.legend(fontsize=7, frameon=False, loc="best")


def plain_log_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers: 0.5, 1, 2, 5, 10."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _arm_rows(axes: Axes, result: Comparison) -> None:
    axes.set_yticks(range(len(result.arms)), list(result.arms))
    axes.set_ylim(len(result.arms) - 0.4, -0.6)
    axes.grid(axis="x")


def _coloured(result: Comparison) -> list[tuple[ArmComparison, str]]:
    return list(zip(result.arms.values(), _cycle(len(result.arms)), strict=True))


def _cycle(count: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(count)]


def _percent(values: Sequence[float]) -> list[float]:
    return [100 * value for value in values]
