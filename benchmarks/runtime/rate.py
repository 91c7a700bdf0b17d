"""The control loop at a fixed rate on the real clock: deadlines, jitter, overhead, memory.

    python benchmarks/runtime/rate.py build/engines/w4a8 --minutes 10 -o benchmarks/runtime/rate.json

The robot shows recorded frames and moves nothing, so that what is measured is the loop with its
inference thread, guard, watchdog and trace, and not a driver. The machine's load is in the result.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import msgspec
from episodes import pinned
from rich.console import Console

from quantvla.cli.live_view import report_lines, report_table
from quantvla.run_config import LogSection, LoopSection, RecordedSpec, RunConfig
from quantvla.running import prepared_run
from quantvla.runtime.control.spec import StrategySpec
from quantvla.runtime.machine import memory


def main() -> None:
    """Run for the time asked for and write the report with the machine's load."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--set", type=Path, default=Path("calib_sets/metaworld"))
    parser.add_argument("--rate", type=float, default=50.0)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--threads", type=int, help="threads of a stage  [default: physical cores]")
    parser.add_argument("--strategy", default="rtc", choices=["sync", "async", "blend", "rtc"])
    given = parser.parse_args()
    samples: list[dict[str, Any]] = []
    ticks = 0

    def sample() -> None:
        nonlocal ticks
        if ticks % round(given.rate * 15) == 0:
            now = memory()
            resident = None if now is None else round(now.resident_mb, 1)
            samples.append({"tick": ticks, "resident_mb": resident, "load": os.getloadavg()[0]})
        ticks += 1

    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(
            engine=given.engine.resolve(),
            threads=given.threads,
            robot=RecordedSpec(path=given.set.resolve()),
            loop=LoopSection(rate_hz=given.rate, seconds=given.minutes * 60),
            strategy=StrategySpec(kind=given.strategy),
            log=LogSection(trace=Path(folder) / "trace.jsonl"),
        )
        with prepared_run(config, on_tick=sample) as prepared:
            report = prepared.run()
    result = {
        "command": f"python benchmarks/runtime/rate.py {pinned(given.engine)} --minutes {given.minutes:g}"
        f" --strategy {given.strategy}" + (f" --threads {given.threads}" if given.threads else ""),
        "engine": pinned(given.engine), "cores": os.cpu_count(), "threads": given.threads,
        "processor": platform.processor() or platform.machine(), "python": platform.python_version(),
        "miss_share": report.deadline_misses / max(report.ticks, 1),
        "report": msgspec.to_builtins(report), "samples": samples,
    }  # fmt: skip
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    console = Console()
    console.print(report_table(report, "control loop"))
    console.print(report_lines(report), highlight=False)


if __name__ == "__main__":
    main()
