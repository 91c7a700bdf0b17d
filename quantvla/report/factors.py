"""Attention corrections as a map: layers down, heads across."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from quantvla.report.structure import AttentionFactors, Report

_NARROWEST = 2  # heads: room for the title of a map with one column
TITLES = {"atm": "head temperature alpha", "ohb": "output balance beta"}
_LEAST_SPAN = 0.05  # so that factors near one do not look large


def factor_figure(report: Report) -> Figure:
    """Return a map per correction, coloured by the applied factor; cells that were clipped have a star."""
    kinds = list(dict.fromkeys(entry.kind for entry in report.factors))
    groups = [[entry for entry in report.factors if entry.kind == kind] for kind in kinds]
    widths = [max(len(entry.applied) for entry in group) for group in groups]
    shares = [max(width, _NARROWEST) for width in widths]
    rows = max(len(group) for group in groups)
    figure = Figure(figsize=(0.62 * sum(shares) + 3.2, 0.34 * rows + 1.3), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False, width_ratios=shares)[0]
    applied = [value for entry in report.factors for value in entry.applied]
    span = max(_LEAST_SPAN, *(abs(value - 1) for value in applied))
    norm = TwoSlopeNorm(1.0, 1 - span, 1 + span)
    image: Any = None
    for axes, kind, group, width in zip(panels, kinds, groups, widths, strict=True):
        image = axes.imshow(_values(group, width), norm=norm, cmap="PuOr", aspect="auto")
        axes.set_title(TITLES.get(kind, kind), fontsize=10)
        axes.set_yticks(range(len(group)), [str(entry.layer) for entry in group])
        axes.set_xticks(range(width), [str(i) for i in range(width)] if width > 1 else ["layer"])
        axes.set_xlabel("head" if width > 1 else "")
        _write(axes, group, 0.7 * span)
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(panels), fraction=0.04).set_label("factor")
    return figure


def _values(group: Sequence[AttentionFactors], width: int) -> Any:
    values = np.full((len(group), width), np.nan)
    for row, entry in enumerate(group):
        values[row, : len(entry.applied)] = entry.applied
    return values


def _write(axes: Axes, group: Sequence[AttentionFactors], dark: float) -> None:
    """Write each factor into its cell, light where it is further than ``dark`` from one."""
    for row, entry in enumerate(group):
        for column, (raw, value) in enumerate(zip(entry.raw, entry.applied, strict=True)):
            clipped = abs(np.log(raw)) > entry.clip
            text = "1" if value == 1 else f"{value:.3f}" + ("*" if clipped else "")
            colour = "white" if abs(value - 1) > dark else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
