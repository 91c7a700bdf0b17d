"""Writing a report: ``report.json`` and one HTML page that needs no other file."""

from __future__ import annotations

import base64
from importlib.resources import files
from pathlib import Path

import msgspec
from jinja2 import Environment, StrictUndefined

from quantvla.report.figures import draw_plots
from quantvla.report.structure import Report
from quantvla.report.table import summary_rows
from quantvla.runtime.errors import explain
from quantvla.runtime.files import write_atomic

JSON_FILE = "report.json"
HTML_FILE = "report.html"
_TEMPLATE = "page.html.jinja"


def write_report(report: Report, directory: Path, *, film: Path | None = None) -> Path:
    """Write ``report.json`` and ``report.html`` to ``directory`` and return the page's path.

    ``film`` is an animated GIF to embed.
    """
    encoded = msgspec.json.format(msgspec.json.encode(report), indent=1)
    write_atomic(directory / JSON_FILE, encoded + b"\n")
    page = directory / HTML_FILE
    write_atomic(page, render_page(report, film=film).encode())
    return page


def read_report(path: Path) -> Report:
    """Return the report in a ``report.json``. Raises `QuantVLAError` if it is not one."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Report)
    except (OSError, msgspec.ValidationError, msgspec.DecodeError) as error:
        raise explain(
            path, f"is not a report ({error})", remedy="run the demo again to write one"
        ) from error


def render_page(report: Report, *, film: Path | None = None) -> str:
    """Return the HTML page with every picture inside."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8")
    film_uri = None
    if film is not None:
        film_uri = "data:image/gif;base64," + base64.b64encode(film.read_bytes()).decode()
    return environment.from_string(source).render(
        report=report,
        rows=summary_rows(report),
        plots=draw_plots(report),
        film=film_uri,
        worst_sites=sorted(report.sites, key=lambda site: -site.relative_error)[:10],
    )
