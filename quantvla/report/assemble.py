"""From what the steps of a run left to a `Report`."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Protocol

import msgspec
from safetensors import safe_open

from quantvla.checkpoint import CheckpointCard, read_card
from quantvla.evaluate.closed_loop import available_cores
from quantvla.evaluate.policy_bench import PolicyBenchReport
from quantvla.evaluate.results import Evaluation, PairResult
from quantvla.plan import Plan
from quantvla.report.structure import (
    ActionError,
    ArmReport,
    ChunkExample,
    Latency,
    MachineReport,
    Memory,
    Report,
    SiteError,
    StepReport,
)
from quantvla.runtime.bench import BenchReport, Percentiles
from quantvla.steps import FinishedStep
from quantvla.verify import VerifyReport
from quantvla.versions import compiler_versions

_HALF_BYTES, _SINGLE_BYTES = 2, 4
_STORED_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


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


def report(
    *,
    title: str,
    titles: Mapping[str, str],
    checkpoint: Path,
    engines: Mapping[str, Path],
    quantized: Path,
    verified: Mapping[str, VerifyReport],
    benches: Benches,
    evaluation: Evaluation,
    examples: tuple[ChunkExample, ...],
    steps: Sequence[FinishedStep],
) -> Report:
    """Return the report of a float policy (the first of ``titles``) and its engines.

    ``quantized`` is the quantized checkpoint; the mappings are by arm name.
    """
    card = read_card(quantized)
    reference = next(iter(titles))
    policy = policy_arm(
        reference,
        titles[reference],
        evaluation=evaluation,
        rounds=benches.policy,
        checkpoint=checkpoint,
        plan=card.plan,
    )
    arms = [
        engine_arm(
            name,
            titles[name],
            evaluation=evaluation,
            rounds=benches.engines[name],
            verified=verified[name],
            engine=path,
            plan=card.plan,
        )
        for name, path in engines.items()
    ]
    threads = {bench.threads for rounds in benches.engines.values() for bench in rounds}
    return Report(
        title=title,
        arms=(policy, *arms),
        pairs=evaluation.pairs,
        tasks=evaluation.tasks,
        episodes_per_task=evaluation.episodes_per_task,
        seed=evaluation.seed,
        sites=site_errors(card),
        examples=examples,
        steps=tuple(map(step_report, steps)),
        notes=notes(evaluation, verified, titles),
        machine=machine_report(max(threads)),
        versions=compiler_versions() | evaluation.versions,
    )


def notes(
    evaluation: Evaluation, verified: Mapping[str, VerifyReport], titles: Mapping[str, str]
) -> tuple[str, ...]:
    """Return what a reader of the table must know: verdicts on success and on verification."""
    found = [success_note(pair, titles) for pair in evaluation.pairs]
    for name, result in verified.items():
        verdict = "passes" if result.passed else "FAILS"
        found.append(
            f"{titles[name]} {verdict} verification on {result.frames} held-out observations."
        )
    return tuple(found)


def policy_arm(
    name: str,
    title: str,
    *,
    evaluation: Evaluation,
    rounds: Sequence[PolicyBenchReport],
    checkpoint: Path,
    plan: Plan,
) -> ArmReport:
    """Return the float policy's part of the report."""
    sites = [entry.site for entry in plan.quantized]
    memory = Memory(
        quantized_parts=stored_weight_bytes(checkpoint, sites),
        quantized_parts_float16=_weights(plan) * _HALF_BYTES,
        files=directory_bytes(checkpoint),
        resident_mb=_largest(bench.resident_mb for bench in rounds),
        peak_rss_mb=_largest(bench.peak_rss_mb for bench in rounds),
    )
    return ArmReport(
        name=name,
        title=title,
        success=evaluation.arms[name],
        chunk_ms=_chunk(rounds),
        stages_ms=_stages(rounds),
        memory=memory,
    )


def engine_arm(
    name: str,
    title: str,
    *,
    evaluation: Evaluation,
    rounds: Sequence[BenchReport],
    verified: VerifyReport,
    engine: Path,
    plan: Plan,
) -> ArmReport:
    """Return an engine's part of the report. Float engines keep the planned sites in 32 bits."""
    integer = verified.integer_sites > 0
    parts = verified.integer_bytes if integer else _weights(plan) * _SINGLE_BYTES
    memory = Memory(
        quantized_parts=parts,
        quantized_parts_float16=_weights(plan) * _HALF_BYTES,
        files=directory_bytes(engine),
        resident_mb=_largest(bench.resident_mb for bench in rounds),
        peak_rss_mb=_largest(bench.peak_rss_mb for bench in rounds),
    )
    error = verified.quantization
    return ArmReport(
        name=name,
        title=title,
        success=evaluation.arms[name],
        action_error=ActionError(
            nrmse=error.nrmse,
            cosine_mean=error.cosine_mean,
            cosine_p5=error.cosine_p5,
            cosine_min=error.cosine_min,
            export_max_abs=(verified.kernel if integer else verified.parity).max_abs,
            observations=verified.frames,
        ),
        chunk_ms=_chunk(rounds),
        stages_ms=_stages(rounds),
        memory=memory,
    )


def site_errors(card: CheckpointCard) -> tuple[SiteError, ...]:
    """Return the last pass's error of every quantized linear, in module order."""
    errors = {site.site: site.relative_output_error for r in card.reports for site in r.sites}
    return tuple(
        SiteError(
            site=entry.site,
            stage=entry.stage,
            layer=entry.layer or 0,
            kind=entry.kind,
            scheme=entry.scheme.name,
            relative_error=errors[entry.site],
        )
        for entry in card.plan.quantized
        if entry.site in errors
    )


def success_note(pair: PairResult, titles: Mapping[str, str]) -> str:
    """Return one sentence on whether the paired difference is more than noise."""
    low, high = (100 * bound for bound in pair.ci95)
    episodes = pair.both + pair.only_a + pair.only_b + pair.neither
    verdict = "within the noise" if low <= 0 <= high else "more than noise"
    return (
        f"{titles[pair.b]} against {titles[pair.a]}: {100 * pair.difference:+.1f} points of success on "
        f"{episodes} paired episodes (95 % interval {low:+.1f} to {high:+.1f}, McNemar "
        f"p {pair.mcnemar_p:.2f}), {verdict}."
    )


def step_report(done: FinishedStep) -> StepReport:
    """Return a step as the report lists it."""
    return StepReport(
        title=done.step.title,
        command=done.step.command,
        duration_s=done.duration_s,
        reused=done.reused,
    )


def machine_report(threads: int) -> MachineReport:
    """Return what this machine is."""
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return MachineReport(
        processor=_processor(),
        cores=available_cores(),
        memory_gib=pages * page / 2**30,
        threads=threads,
    )


def stored_weight_bytes(checkpoint: Path, sites: Sequence[str]) -> int:
    """Return the bytes that the sites' weights take in a LeRobot checkpoint."""
    total = 0
    with safe_open(checkpoint / "model.safetensors", framework="np") as stored:
        for site in sites:
            weight = stored.get_slice(f"{site}.weight")
            rows, columns = weight.get_shape()
            total += rows * columns * _STORED_BYTES[weight.get_dtype()]
    return total


def directory_bytes(directory: Path) -> int:
    """Return the size of all files below ``directory``."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _weights(plan: Plan) -> int:
    return sum(entry.out_features * entry.in_features for entry in plan.quantized)


def _chunk(rounds: Sequence[_Measured]) -> Latency:
    """Return the median over the rounds of each round's percentiles."""
    return Latency(
        p50=median(bench.chunk_ms.p50 for bench in rounds),
        p99=median(bench.chunk_ms.p99 for bench in rounds),
    )


def _stages(rounds: Sequence[_Measured]) -> dict[str, Latency]:
    *_, repeated = rounds[0].stages
    return {
        stage: Latency(
            p50=median(bench.stages[stage].p50 for bench in rounds),
            p99=median(bench.stages[stage].p99 for bench in rounds),
            repeat=rounds[0].denoise_steps if stage == repeated else 1,
        )
        for stage in rounds[0].stages
    }


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
