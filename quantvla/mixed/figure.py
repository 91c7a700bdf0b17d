"""The picture of a mixed-precision plan: the frontier, and which site got which format."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from quantvla.mixed.choose import MixedPlan, Point, SiteChoice
from quantvla.runtime.files import write_atomic

_STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def write_figure(path: Path, plan: MixedPlan) -> None:
    """Write the PNG of ``plan``."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(10, 7.5), layout="constrained")
        upper, lower = figure.subplots(2, 1, height_ratios=(3, 2))
        _frontier(upper, plan)
        _map(lower, plan.sites)
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def _frontier(axes: Axes, plan: MixedPlan) -> None:
    by_bytes = plan.budget_mib is not None

    def x(point: Point) -> float:
        return point.mib if by_bytes else point.latency_ms or 0.0

    curve = sorted(plan.frontier, key=x)
    axes.plot(
        [x(p) for p in curve], [100 * p.predicted_nrmse for p in curve], "-o", ms=3,
        color="#3b82c4", label="best mixture for each budget, predicted",
    )  # fmt: skip
    marks = [*plan.uniform, plan.base]
    axes.plot(
        [x(p) for p in marks], [100 * p.predicted_nrmse for p in marks], "s", ms=5,
        color="#8c8c8c", label="one format everywhere, predicted",
    )  # fmt: skip
    measured = [p for p in (*marks, *curve, plan.chosen) if p.measured_nrmse is not None]
    axes.plot(
        [x(p) for p in measured], [100 * (p.measured_nrmse or 0) for p in measured], "x", ms=6,
        color="#e07b28", label="measured with all sites at once",
    )  # fmt: skip
    axes.plot(
        x(plan.chosen), 100 * plan.chosen.predicted_nrmse, "*", ms=13, color="#a33b8a",
        label="chosen",
    )  # fmt: skip
    names: dict[tuple[float, float], list[str]] = {}
    for point in marks:
        names.setdefault((x(point), 100 * point.predicted_nrmse), []).append(point.name)
    for position, same in names.items():  # the base recipe may be one of the uniform ones
        axes.annotate(
            " = ".join(same), position, xytext=(5, 4), textcoords="offset points", fontsize=8
        )
    if all(p.predicted_nrmse > 0 for p in (*curve, *marks, plan.chosen)):
        axes.set_yscale("log")
    else:  # a choice that keeps everything float has no error
        axes.set_yscale("symlog", linthresh=0.05)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_ylabel("action error, nrmse in %")
    axes.set_xlabel(
        "weights and scales of the sites on offer, MiB" if by_bytes else "kernel time of the sites on offer, ms a chunk"
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _map(axes: Axes, sites: tuple[SiteChoice, ...]) -> None:
    """Draw a row per kind of linear and a column per layer of each part, coloured by format."""
    formats = sorted({site.format for site in sites})
    kinds = list(dict.fromkeys(site.kind for site in sites))
    columns = list(dict.fromkeys((site.part, site.layer) for site in sites))
    columns.sort(key=lambda c: ([s.part for s in sites].index(c[0]), -1 if c[1] is None else c[1]))
    grid = np.full((len(kinds), len(columns)), np.nan)
    for site in sites:
        row, column = kinds.index(site.kind), columns.index((site.part, site.layer))
        grid[row, column] = formats.index(site.format)
        axes.text(column, row, f"{100 * site.nrmse:.2g}", ha="center", va="center", fontsize=7)
    colours = mpl.colormaps["Pastel1"].resampled(9)(np.arange(len(formats)) % 9)
    cmap = mpl.colors.ListedColormap(list(colours))
    norm = BoundaryNorm(np.arange(len(formats) + 1) - 0.5, len(formats))
    axes.imshow(grid, cmap=cmap, norm=norm, aspect="auto")
    axes.set_yticks(range(len(kinds)), kinds)
    labels = [f"{part} {'' if layer is None else layer}".strip() for part, layer in columns]
    axes.set_xticks(range(len(columns)), labels, rotation=90, fontsize=8)
    axes.set_title(
        "format of each linear, and the action error it adds alone, nrmse in %", fontsize=9
    )
    handles = [
        Patch(color=colour, label=name) for colour, name in zip(colours, formats, strict=True)
    ]
    axes.legend(handles=handles, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
