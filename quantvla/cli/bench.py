"""``quantvla bench``: latency and memory of an engine on this machine."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from quantvla.runtime.bench import BenchReport, Percentiles
from quantvla.runtime.bench import bench as run_bench


@click.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.option("--repeats", default=50, show_default=True, help="Action chunks that count.")
@click.option("--warmup", default=5, show_default=True, help="Action chunks before those.")
@click.option("--threads", type=int, help="Threads per stage.  [default: physical cores]")
def bench(engine: Path, as_json: bool, repeats: int, warmup: int, threads: int | None) -> None:
    """Measure latency and memory of the ENGINE directory in a fresh process."""
    if as_json:
        report = run_bench(engine, repeats=repeats, warmup=warmup, threads=threads)
        click.echo(msgspec.json.format(msgspec.json.encode(report), indent=2))
        return
    with Console(stderr=True).status(f"measuring {repeats} action chunks"):
        report = run_bench(engine, repeats=repeats, warmup=warmup, threads=threads)
    console = Console()
    console.print(_table(engine, report))
    console.print(_footer(report))


def _table(engine: Path, report: BenchReport) -> Table:
    title = f"{engine}: {report.family}, {report.recipe}, {report.target}"
    table = Table(title=escape(title))
    table.add_column("part")
    table.add_column("runs per chunk", justify="right")
    table.add_column("p50 ms", justify="right")
    table.add_column("p99 ms", justify="right")
    *once, repeated = report.stages
    rows: list[tuple[str, int, Percentiles]] = [("preprocess", 1, report.preprocess_ms)]
    rows += [(name, report.runs.get(name, 1), report.stages[name]) for name in once]
    rows += [(f"{repeated} (one step)", report.denoise_steps, report.stages[repeated])]
    rows += [(f"{repeated} (all steps)", 1, report.loop_ms), ("chunk", 1, report.chunk_ms)]
    for name, runs, times in rows:
        table.add_row(name, str(runs), f"{times.p50:.2f}", f"{times.p99:.2f}")
    return table


def _footer(report: BenchReport) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return (
        f"memory: {_mib(report.resident_mb)} resident, {_mib(report.peak_rss_mb)} at its peak, "
        f"{_mib(report.before_load_mb)} before loading\n"
        f"load {report.load_ms:.0f} ms, first chunk {report.first_chunk_ms:.0f} ms; "
        f"{report.threads} threads, {report.repeats} chunks after {report.warmup}\n{versions}"
    )


def _mib(amount: float | None) -> str:
    return "unknown" if amount is None else f"{amount:.0f} MiB"
