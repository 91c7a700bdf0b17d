"""Progress on stderr for work that takes a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from quantvla.progress import Progress as Report


@contextmanager
def progress_bar() -> Iterator[Report]:
    """Yield ``report(what, done, total)``; each new ``what`` becomes a bar with the time left."""
    columns = (
        TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                _complete(bars)
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report
        _complete(bars)


def _complete(bars: Progress) -> None:
    """Fill the bars shown so far: work is reported in order, so what came before is done."""
    for task in bars.tasks:
        bars.update(task.id, completed=task.total or 0)
