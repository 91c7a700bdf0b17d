"""Rendering of figures for a light or a dark page, the same bytes for the same report."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from quantvla.report.structure import Report

_DPI = 150


@dataclass(frozen=True)
class Theme:
    """Colours of a page."""

    name: str
    text: str
    line: str
    ground: str


LIGHT = Theme("light", "#1f2328", "#d0d7de", "#ffffff")
DARK = Theme("dark", "#e6e6e6", "#484f58", "#161b22")


def png_data_uri(draw: Callable[[Report], Figure], report: Report, theme: Theme) -> str:
    """Return what ``draw`` draws in the colours of the theme, as a PNG data URI."""
    png = render_png(lambda: draw(report), theme)
    return "data:image/png;base64," + base64.b64encode(png).decode()


def render_png(draw: Callable[[], Figure], theme: Theme = LIGHT) -> bytes:
    """Return what ``draw`` draws in the colours of the theme, as a PNG file's bytes."""
    style: Any = {
        "text.color": theme.text,
        "axes.labelcolor": theme.text,
        "axes.edgecolor": theme.line,
        "axes.facecolor": theme.ground,
        "figure.facecolor": theme.ground,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
        "grid.color": theme.line,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "font.size": 9,
    }
    with mpl.rc_context(style):
        buffer = io.BytesIO()
        draw().savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()
