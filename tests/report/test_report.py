"""The report: every part of the structure is on the page, and the page needs no other file."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import msgspec
import pytest
from PIL import Image
from rich.console import Console
from sample_report import ARMS, TITLES, sample_report, sample_rollouts

from quantvla.report.figures import draw_plots
from quantvla.report.film import MAX_BYTES, write_film
from quantvla.report.structure import ArmReport, Report
from quantvla.report.table import summary_rows, summary_table
from quantvla.report.write import read_report, render_page, write_report
from quantvla.runtime.errors import QuantVLAError

FIGURES = ("success", "latency", "sites", "factors", "chunks")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a film and a written report."""
    directory = tmp_path_factory.mktemp("report")
    write_film(sample_rollouts(), directory / "film.gif")
    write_report(sample_report(), directory, film=directory / "film.gif")
    return directory


def test_the_page_has_every_figure_and_needs_no_other_file(output: Path) -> None:
    page = (output / "report.html").read_text()
    for name in ("summary", "notes", "film", *FIGURES, "factor-table", "worst-sites", "steps"):
        assert f'<section id="{name}">' in page
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) == 1 + 2 * len(FIGURES)
    assert all(source.startswith("data:image/") for source in sources)
    assert "&lt;hard&gt;" in page
    for title in TITLES:
        assert title in page


def test_json_round_trip(output: Path) -> None:
    assert read_report(output / "report.json") == sample_report()
    assert json.loads((output / "report.json").read_text())["arms"][2]["name"] == "w4a8"


def test_the_same_report_gives_the_same_page(output: Path) -> None:
    page = render_page(sample_report(), film=output / "film.gif")
    assert page == (output / "report.html").read_text()


def test_a_report_with_one_bare_arm_renders_without_figures() -> None:
    page = render_page(Report(title="Empty", arms=(ArmReport(name="a", title="Arm A"),)))
    assert "Arm A" in page
    for name in ("film", *FIGURES, "factor-table", "worst-sites", "steps"):
        assert f'id="{name}"' not in page


def test_light_and_dark_pictures_differ() -> None:
    for plot in draw_plots(msgspec.structs.replace(sample_report(), sites=(), examples=())):
        assert plot.light != plot.dark


def test_summary_cells() -> None:
    rows = {row.measure.strip(): row.cells for row in summary_rows(sample_report())}
    assert rows["Success in closed loop"][0] == "94/120  78 % [70-85]"
    assert rows["Difference to the reference"][0] == "-"
    assert rows["Quantized parts, scales counted"][2] == "1.09 MB (-72.1 % vs FP16)"
    assert rows["denoise, each of 10 calls"][2] == "1.20 / 1.44 ms"
    assert rows["Resident / peak memory"][0] == "610 / 732 MB"


def test_the_terminal_shows_the_same_cells() -> None:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(summary_table(sample_report()))
    text = console.export_text()
    for row in summary_rows(sample_report()):
        for cell in (row.measure, *row.cells):
            assert cell in text


def test_not_a_report(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text('{"title": 3}')
    with pytest.raises(QuantVLAError, match=r"report.json: is not a report"):
        read_report(path)


def test_the_film_shows_every_rollout_to_its_end(tmp_path: Path) -> None:
    rollouts = sample_rollouts()
    path = tmp_path / "film.gif"
    write_film(rollouts, path)
    assert path.stat().st_size <= MAX_BYTES
    with Image.open(path) as film:
        assert getattr(film, "n_frames", 1) == max(len(rollout.frames) for rollout in rollouts)
        width, height = film.size
    assert width > height
    first = path.read_bytes()
    write_film(rollouts, path)
    assert path.read_bytes() == first


def test_a_long_film_is_made_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "film.gif"
    write_film(sample_rollouts(), path)
    before = path.stat().st_size
    monkeypatch.setattr("quantvla.report.film.MAX_BYTES", before - 1)
    write_film(sample_rollouts(), path)
    assert path.stat().st_size < before


def test_a_film_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QuantVLAError, match="no rollouts to film"):
        write_film((), tmp_path / "film.gif")


def test_arms_keep_their_order() -> None:
    encoded = msgspec.json.decode(msgspec.json.encode(sample_report()), type=Report)
    assert tuple(arm.name for arm in encoded.arms) == ARMS
