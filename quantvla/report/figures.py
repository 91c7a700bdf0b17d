"""The plots of a report, each a function that draws on a matplotlib figure; rendered for light and dark pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from quantvla.evaluate.results import ArmResult, TaskResult
from quantvla.report.factors import factor_figure
from quantvla.report.render import DARK, LIGHT, png_data_uri
from quantvla.report.structure import ArmReport, Report, SiteError
from quantvla.report.table import stage_names

ARM_COLOURS = ("#8c8c8c", "#3b82c4", "#e07b28", "#3a9e6e", "#a765b8")
"""By position: the reference is grey."""
_P99_SHOWN = 1.6
"""A p99 beyond this multiple of the longest bar would squeeze the bars; it is written, not drawn."""
STAGE_COLOURS = ("#5b8fc9", "#7fb685", "#e0a458", "#b07aa1", "#9c9c9c")


@dataclass(frozen=True)
class Plot:
    """One plot: its heading, what the reader sees in it, and PNG data URIs for light and dark pages."""

    name: str
    heading: str
    caption: str
    light: str
    dark: str


@dataclass(frozen=True)
class _Recipe:
    name: str
    heading: str
    caption: str
    has_data: Callable[[Report], bool]
    draw: Callable[[Report], Figure]


def draw_plots(report: Report) -> tuple[Plot, ...]:
    """Return every plot for which the report has data."""
    return tuple(
        Plot(
            recipe.name,
            recipe.heading,
            recipe.caption,
            png_data_uri(recipe.draw, report, LIGHT),
            png_data_uri(recipe.draw, report, DARK),
        )
        for recipe in _RECIPES
        if recipe.has_data(report)
    )


def success_figure(report: Report) -> Figure:
    """Return success per task and over all, one dot per arm with its Wilson 95 % interval."""
    arms = [arm for arm in report.arms if arm.success is not None]
    rows = [*report.tasks, "all tasks"]
    figure = Figure(figsize=(8, 0.5 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    offsets = np.linspace(-0.22, 0.22, len(arms)) if len(arms) > 1 else [0.0]
    for arm, offset, colour in zip(arms, offsets, _colours(report, arms), strict=True):
        results = [_result(arm, task) for task in rows]
        rates = np.array([100 * result.rate for result in results])
        bounds = 100 * np.array([result.ci95 for result in results])
        axes.errorbar(
            rates,
            np.arange(len(rows)) + offset,
            xerr=np.abs(np.stack([rates - bounds[:, 0], bounds[:, 1] - rates])),
            fmt="o",
            markersize=5,
            capsize=2.5,
            linewidth=1.3,
            color=colour,
            label=arm.title,
        )
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.axhline(len(rows) - 1.5, color=mpl.rcParams["grid.color"], linewidth=1)
    axes.set_xlim(-2, 102)
    axes.set_xlabel("success, %")
    axes.grid(axis="x")
    _legend_above(figure, axes)
    return figure


def latency_figure(report: Report) -> Figure:
    """Return how each arm's median chunk latency splits into stages, with the chunk's p99 marked."""
    arms = [arm for arm in report.arms if arm.chunk_ms is not None]
    stages = stage_names(arms)
    figure = Figure(figsize=(8, 0.6 * len(arms) + 1.3), layout="constrained")
    axes = figure.subplots()
    ends = np.zeros(len(arms))
    rows = np.arange(len(arms))
    for stage, colour in zip(stages, STAGE_COLOURS, strict=False):
        width = np.array([_stage_total(arm, stage) for arm in arms])
        axes.barh(rows, width, left=ends, height=0.55, color=colour, label=stage)
        ends += width
    chunks = np.array([arm.chunk_ms.p50 for arm in arms if arm.chunk_ms])
    rest = np.maximum(chunks - ends, 0)
    longest = _P99_SHOWN * max(ends + rest)
    axes.barh(rows, rest, left=ends, height=0.55, color="#9c9c9c", label="the rest")
    for row, arm in enumerate(arms):
        assert arm.chunk_ms is not None
        edge = ends[row] + rest[row]
        if arm.chunk_ms.p99 <= longest:
            colour = mpl.rcParams["text.color"]
            axes.plot([arm.chunk_ms.p99] * 2, [row - 0.3, row + 0.3], color=colour)
            edge = max(edge, arm.chunk_ms.p99)
        text = f" {arm.chunk_ms.p50:.1f} (p99 {arm.chunk_ms.p99:.1f})"
        axes.text(edge, row, text, va="center", fontsize=9)
    axes.set_yticks(rows, [arm.title for arm in arms])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per action chunk (bars: medians; line: p99 where it fits)")
    axes.margins(x=0.3)
    axes.set_xlim(left=0)
    _legend_above(figure, axes)
    return figure


def site_error_figure(report: Report) -> Figure:
    """Return a map per stage: linears by kind (rows) and layer (columns), coloured by relative error."""
    stages = list(dict.fromkeys(site.stage for site in report.sites))
    kinds = tuple(dict.fromkeys(site.kind for site in report.sites))
    grids = [_grid([site for site in report.sites if site.stage == s], kinds) for s in stages]
    widths = [grid.values.shape[1] for grid in grids]
    figure = Figure(figsize=(9, 0.36 * len(kinds) + 1.2), layout="constrained")
    panels = figure.subplots(1, len(stages), squeeze=False, width_ratios=widths, sharey=True)[0]
    errors = [_percent(site) for site in report.sites]
    norm = LogNorm(min(errors), max(max(errors), 1.01 * min(errors)))
    for axes, stage, grid in zip(panels, stages, grids, strict=True):
        image = axes.imshow(grid.values, norm=norm, cmap="viridis", aspect="auto")
        axes.set_title(stage, fontsize=10)
        axes.set_yticks(range(len(kinds)), kinds)
        _layer_ticks(axes, grid.layers)
        axes.set_xlabel("layer")
        if grid.values.size <= 120:
            _write_cells(axes, grid.values, norm)
    colourbar = figure.colorbar(image, ax=list(panels), fraction=0.04)
    colourbar.ax.yaxis.set_major_formatter("{x:g}")
    colourbar.ax.yaxis.set_minor_formatter("{x:g}")
    colourbar.set_label("relative output error, %")
    return figure


def chunk_figure(report: Report) -> Figure:
    """Return the arms' chunks over one another: a row per observation, a column per action dimension."""
    names = report.examples[0].action_names
    size = (2.4 * len(names) + 0.6, 1.75 * len(report.examples) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(report.examples), len(names), squeeze=False, sharex=True)
    titles = {arm.name: arm.title for arm in report.arms}
    colours = dict(zip([a.name for a in report.arms], ARM_COLOURS, strict=False))
    for row, example in zip(panels, report.examples, strict=True):
        for index, axes in enumerate(row):
            axes.axvspan(0, example.execute - 1, color=mpl.rcParams["grid.color"], alpha=0.35, lw=0)
            for number, (arm, chunk) in enumerate(example.chunks.items()):
                curve = [action[index] for action in chunk]
                width = 3.2 if number == 0 else 1.5
                style = "-" if number < 2 else "--"
                axes.plot(curve, style, color=colours[arm], lw=width, label=titles[arm])
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.5)
        row[0].set_ylabel(example.label, fontsize=8)
    for axes, name in zip(panels[0], names, strict=True):
        axes.set_title(name, fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("step", fontsize=8)
    _legend_above(figure, panels[0][0])
    return figure


_RECIPES = (
    _Recipe(
        "success",
        "Success in closed loop",
        "Share of episodes solved with Wilson's 95 % interval. All arms run the same goals with the "
        "same flow noise.",
        lambda report: bool(report.tasks) and any(arm.success for arm in report.arms),
        success_figure,
    ),
    _Recipe(
        "latency",
        "Latency of a chunk by stage",
        "Median time of each stage times its calls per chunk, measured in turns on the same machine. "
        "The PyTorch policy's chunk is lerobot's own call; its stages are timed one by one.",
        lambda report: any(arm.chunk_ms for arm in report.arms),
        latency_figure,
    ),
    _Recipe(
        "sites",
        "Quantization error by linear",
        "RMS of each quantized linear's output error over the RMS of its float output, over the "
        "calibration set. Empty cells stay in float, or are dropped because nothing reads them.",
        lambda report: bool(report.sites),
        site_error_figure,
    ),
    _Recipe(
        "factors",
        "Attention corrections",
        "What each head's logits (alpha) and each attention's output (beta) are multiplied with, folded "
        "into the weights. 1: inside the neutral band; a star: cut at the bound.",
        lambda report: bool(report.factors),
        factor_figure,
    ),
    _Recipe(
        "chunks",
        "Action chunks on held-out observations",
        "Same observation and noise for every arm. The shaded steps are executed before the next "
        "chunk.",
        lambda report: bool(report.examples),
        chunk_figure,
    ),
)


@dataclass(frozen=True)
class _Grid:
    layers: tuple[int, ...]
    values: Any


def _grid(sites: Sequence[SiteError], kinds: Sequence[str]) -> _Grid:
    layers = tuple(sorted({site.layer for site in sites}))
    values = np.full((len(kinds), len(layers)), np.nan)
    for site in sites:
        cell = kinds.index(site.kind), layers.index(site.layer)
        values[cell] = _percent(site)
    return _Grid(layers, values)


def _percent(site: SiteError) -> float:
    return 100 * max(site.relative_error, 1e-6)


def _layer_ticks(axes: Axes, layers: Sequence[int]) -> None:
    every = max(1, len(layers) // 8)
    positions = list(range(0, len(layers), every))
    axes.set_xticks(positions, [str(layers[p]) for p in positions])


def _write_cells(axes: Axes, values: Any, norm: LogNorm) -> None:
    """Write each error in percent into its cell, dark on light cells and light on dark ones."""
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "black" if float(norm(value)) > 0.6 else "white"
            label = f"{value:.2g}"
            axes.text(column, row, label, ha="center", va="center", fontsize=7, color=colour)


def _result(arm: ArmReport, task: str) -> ArmResult | TaskResult:
    assert arm.success is not None
    return arm.success.tasks.get(task, arm.success)


def _stage_total(arm: ArmReport, stage: str) -> float:
    latency = arm.stages_ms.get(stage)
    return 0.0 if latency is None else latency.per_chunk_ms


def _colours(report: Report, arms: Sequence[ArmReport]) -> list[str]:
    return [ARM_COLOURS[report.arms.index(arm) % len(ARM_COLOURS)] for arm in arms]


def _legend_above(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=5, frameon=False, fontsize=9)
