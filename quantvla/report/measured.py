"""Measurements of all arms over several rounds, and the machine they were made on, as the report states them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Protocol

import msgspec

from quantvla.evaluate.closed_loop import available_cores
from quantvla.evaluate.policy_bench import PolicyBenchReport
from quantvla.report.structure import Latency, MachineReport
from quantvla.runtime.bench import BenchReport, Percentiles
from quantvla.runtime.machine import processor


class Benches(msgspec.Struct, frozen=True, kw_only=True):
    """Measurements of all arms in turns: one entry per round."""

    policy: tuple[PolicyBenchReport, ...]
    engines: dict[str, tuple[BenchReport, ...]]


class _Measured(Protocol):
    @property
    def chunk_ms(self) -> Percentiles: ...
    @property
    def stages(self) -> dict[str, Percentiles]: ...
    @property
    def denoise_steps(self) -> int: ...
    @property
    def resident_mb(self) -> float | None: ...
    @property
    def peak_rss_mb(self) -> float | None: ...


def chunk_latency(rounds: Sequence[_Measured]) -> Latency:
    """Return the median over the rounds of each round's percentiles."""
    return Latency(
        p50=median(bench.chunk_ms.p50 for bench in rounds),
        p99=median(bench.chunk_ms.p99 for bench in rounds),
    )


def stage_latencies(rounds: Sequence[_Measured]) -> dict[str, Latency]:
    """Return every stage's latency, medians over the rounds; the last stage is the repeated one."""
    *_, repeated = rounds[0].stages
    return {
        stage: Latency(
            p50=median(bench.stages[stage].p50 for bench in rounds),
            p99=median(bench.stages[stage].p99 for bench in rounds),
            repeat=rounds[0].denoise_steps if stage == repeated else 1,
        )
        for stage in rounds[0].stages
    }


def engine_stage_latencies(rounds: Sequence[BenchReport]) -> dict[str, Latency]:
    """Return the stages with preprocessing before them; the loop is measured as a whole too."""
    stages = stage_latencies(rounds)
    *_, repeated = stages
    loop = median(bench.loop_ms.p50 for bench in rounds)
    stages[repeated] = msgspec.structs.replace(stages[repeated], chunk_p50=loop)
    preprocess = Latency(
        p50=median(bench.preprocess_ms.p50 for bench in rounds),
        p99=median(bench.preprocess_ms.p99 for bench in rounds),
    )
    return {"preprocess": preprocess, **stages}


def largest(values: Iterable[float | None]) -> float | None:
    """Return the largest known value, None if none is known."""
    return max((value for value in values if value is not None), default=None)


def machine_report(threads: int) -> MachineReport:
    """Return what this machine is."""
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return MachineReport(
        processor=processor(),
        cores=available_cores(),
        memory_gib=pages * page / 2**30,
        threads=threads,
    )
