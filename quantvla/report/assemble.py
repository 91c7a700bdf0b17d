"""From what the steps of a run left to a `Report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from quantvla.checkpoint import CheckpointCard, read_card
from quantvla.evaluate.policy_bench import PolicyBenchReport
from quantvla.evaluate.results import Evaluation, PairResult
from quantvla.plan import Plan
from quantvla.report.measured import (
    Benches,
    chunk_latency,
    engine_stage_latencies,
    largest,
    machine_report,
    stage_latencies,
)
from quantvla.report.structure import (
    ActionError,
    ArmReport,
    AttentionFactors,
    ChunkExample,
    Memory,
    Report,
    SiteError,
    StepReport,
)
from quantvla.runtime.bench import BenchReport
from quantvla.steps import FinishedStep
from quantvla.verify_report import VerifyReport
from quantvla.versions import compiler_versions

_HALF_BYTES, _SINGLE_BYTES = 2, 4
_STORED_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Results:
    """What the steps of a run left; ``quantized`` is the quantized checkpoint, the mappings are by engine name."""

    checkpoint: Path
    quantized: Path
    engines: Mapping[str, Path]
    verified: Mapping[str, VerifyReport]
    benches: Benches
    evaluation: Evaluation
    examples: tuple[ChunkExample, ...]
    steps: tuple[FinishedStep, ...]


def assemble_report(title: str, titles: Mapping[str, str], results: Results) -> Report:
    """Return the report of a float policy (the first of ``titles``, arm name to title) and its engines."""
    card = read_card(results.quantized)
    evaluation, benches = results.evaluation, results.benches
    reference = next(iter(titles))
    policy = policy_arm(
        reference,
        titles[reference],
        evaluation=evaluation,
        rounds=benches.policy,
        checkpoint=results.checkpoint,
        plan=card.plan,
    )
    arms = [
        engine_arm(
            name,
            titles[name],
            evaluation=evaluation,
            rounds=benches.engines[name],
            verified=results.verified[name],
            engine=path,
            plan=card.plan,
        )
        for name, path in results.engines.items()
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
        factors=attention_factors(card),
        examples=results.examples,
        steps=tuple(map(step_report, results.steps)),
        notes=(*notes(evaluation, results.verified, titles), *pass_notes(card)),
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


def pass_notes(card: CheckpointCard) -> tuple[str, ...]:
    """Return what the passes say a reader must see: fallbacks, clipped factors, what did not fold."""
    return tuple(f"{report.kind}: {note}" for report in card.reports for note in report.notes)


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
        resident_mb=largest(bench.resident_mb for bench in rounds),
        peak_rss_mb=largest(bench.peak_rss_mb for bench in rounds),
    )
    return ArmReport(
        name=name,
        title=title,
        success=evaluation.arms[name],
        chunk_ms=chunk_latency(rounds),
        stages_ms=stage_latencies(rounds),
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
        resident_mb=largest(bench.resident_mb for bench in rounds),
        peak_rss_mb=largest(bench.peak_rss_mb for bench in rounds),
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
            observations=verified.frames,
            lowering_max_abs=None if integer else verified.parity.max_abs,
            kernel_max_relative=verified.kernel.max_abs if integer else None,
        ),
        chunk_ms=chunk_latency(rounds),
        stages_ms=engine_stage_latencies(rounds),
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


def attention_factors(card: CheckpointCard) -> tuple[AttentionFactors, ...]:
    """Return what the attention corrections of the recipe multiply with, pass by pass."""
    return tuple(
        AttentionFactors(
            kind=report.kind, site=entry.site, layer=entry.layer, raw=entry.raw,
            applied=entry.applied, clip=report.clip or 0.0, band=report.band or 0.0,
        )
        for report in card.reports
        for entry in report.factors
    )  # fmt: skip


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
