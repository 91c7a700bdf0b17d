"""`quantvla export --target jetson-orin|jetson-thor|rtx`: strongly typed graphs for TensorRT.

The graphs are plain ONNX: `quantvla build` on the GPU compiles them, and ONNX Runtime runs the same
files unfused, which is how their numerics are checked without a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import onnx_ir as ir

from quantvla.activation_scales import StaticInput, fits_int8, static_inputs
from quantvla.export.attention_form import shape_attention_
from quantvla.export.embeddings import narrow_embeddings_
from quantvla.export.engine import make_manifest
from quantvla.export.euler_output import add_next_state_, next_state_spec
from quantvla.export.graphs import save_graph
from quantvla.export.half_precision import narrow_doubles_, to_half_
from quantvla.export.marked_graphs import (
    MarkedGraphs,
    float_weight,
    marked_graphs,
    stored_bias,
    stored_weight,
)
from quantvla.export.source import SourcePolicy
from quantvla.export.tensorrt_rules import check_graph
from quantvla.export.tensorrt_sites import PlacedSite, TargetSite, place_sites_
from quantvla.families.base import LoadedPolicy, Stage
from quantvla.progress import Progress
from quantvla.runtime.errors import explain
from quantvla.runtime.files import atomic_directory
from quantvla.runtime.manifest import (
    MANIFEST_FILE,
    EulerSampler,
    Manifest,
    StageSpec,
    TensorSpec,
    encode_manifest,
)
from quantvla.runtime.site_formats import (
    FORMATS_FILE,
    EmbeddingFormat,
    SiteFormat,
    SiteFormats,
    encode_formats,
)
from quantvla.runtime.targets import board_named, formats_of, target_named
from quantvla.runtime.wiring import check_wiring
from quantvla.statistics import SiteStatistics
from quantvla.target_plan import TABLE, TargetPlan, relax

STATIC = ("int8", "fp8", "nvfp4")


def export_tensorrt(
    source: SourcePolicy,
    plan: TargetPlan,
    statistics: Mapping[str, SiteStatistics],
    output: Path,
    *,
    graphs: MarkedGraphs | None = None,
    overwrite: bool = False,
    progress: Progress = lambda _what, _done, _total: None,
) -> Manifest:
    """Write the engine of a loaded policy for ``plan`` to ``output``, whole or not at all.

    Sites for whose input one int8 scale is not enough do not run in int8; the engine's formats say so.
    ``statistics`` are of the inputs of the sites that `static_sites` names; ``graphs`` from
    `marked_graphs` of the same policy, made here if absent. Raises `QuantVLAError` for a graph that
    the target's TensorRT does not read.
    """
    loaded = source.loaded
    static = _static_inputs(loaded, plan, statistics)
    plan = _settle(plan, source, static)
    sites = _target_sites(loaded, plan, static)
    graphs = marked_graphs(loaded, progress) if graphs is None else graphs
    formats: list[SiteFormat] = []
    embeddings: list[EmbeddingFormat] = []
    specs: list[StageSpec] = []
    with atomic_directory(output, overwrite=overwrite) as directory:
        for index, stage in enumerate(loaded.stages):
            progress("lowering", index, len(loaded.stages))
            model = graphs.stages[stage.name].clone()
            spec, lowered = _write_stage(directory, loaded, stage, model, sites, plan)
            specs.append(spec)
            formats += _formats(lowered.placed, stage.name, plan)
            embeddings += lowered.embeddings
        progress("lowering", len(loaded.stages), len(loaded.stages))
        _require_all(sites, formats)
        if plan.embedding != "half" and not embeddings:
            raise explain(
                "token embedding", "no table that token ids look up is in the graphs",
                got=f"--embedding {plan.embedding}", remedy="leave --embedding out",
            )  # fmt: skip
        board = board_named(plan.board)
        content = SiteFormats(
            board=plan.board, compute_capabilities=_capabilities(plan, board.compute_capability),
            activations=plan.activations, sites=tuple(formats), embeddings=tuple(embeddings),
        )  # fmt: skip
        (directory / FORMATS_FILE).write_bytes(encode_formats(content))
        for name, data in loaded.interface.files.items():
            (directory / name).write_bytes(data)
        manifest = make_manifest(directory, source, tuple(specs), plan.target)
        sampler = msgspec.structs.replace(manifest.sampler, only_own_times=graphs.only_own_times)
        manifest = msgspec.structs.replace(manifest, sampler=sampler)
        check_wiring(manifest)
        (directory / MANIFEST_FILE).write_bytes(encode_manifest(manifest))
    return manifest


def static_sites(plan: TargetPlan) -> tuple[str, ...]:
    """Return the sites whose input needs a static scale, for calibration."""
    return tuple(entry.site for entry in plan.entries if entry.format in STATIC)


def _capabilities(plan: TargetPlan, planned: int) -> tuple[int, ...]:
    """Return the GPUs of the target that have every format of the plan, the planned one first."""
    needed = {entry.format for entry in plan.entries if entry.format != TABLE} | {plan.activations}
    able = [
        sm
        for sm in target_named(plan.target).compute_capabilities
        if needed <= {*formats_of(sm), "fp16"}
    ]
    return (planned, *(sm for sm in able if sm != planned))


def _static_inputs(
    loaded: LoadedPolicy, plan: TargetPlan, statistics: Mapping[str, SiteStatistics]
) -> dict[str, StaticInput]:
    formats = {entry.site: entry.format for entry in plan.entries if entry.format in STATIC}
    weights = {
        site: float_weight(stored_weight(loaded.policy.get_submodule(site))) for site in formats
    }
    return static_inputs(weights, statistics, _same_input(loaded, formats), formats)


def _settle(
    plan: TargetPlan, source: SourcePolicy, static: Mapping[str, StaticInput]
) -> TargetPlan:
    """Return the plan without int8 where the calibrated input does not fit it."""
    errors = {
        entry.site: static[entry.site].error
        for entry in plan.entries
        if entry.format == "int8" and not fits_int8(static[entry.site])
    }
    return relax(plan, source.plan, errors) if source.plan is not None else plan


def _target_sites(
    loaded: LoadedPolicy, plan: TargetPlan, static: Mapping[str, StaticInput]
) -> dict[str, TargetSite]:
    return {
        entry.site: TargetSite(
            entry.site, entry.format, stored_weight(loaded.policy.get_submodule(entry.site)),
            stored_bias(loaded.policy.get_submodule(entry.site)),
            static.get(entry.site) if entry.format in STATIC else None,
        )
        for entry in plan.entries
        if entry.format != TABLE
    }  # fmt: skip


def _same_input(loaded: LoadedPolicy, formats: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Return the sites of ``formats`` in groups that read the same tensor in the same format."""
    groups: dict[tuple[str, ...], None] = {}
    for site in loaded.used_sites:
        if site.name in formats:
            together = {site.name, *site.siblings}
            same = [s for s in formats if s in together and formats[s] == formats[site.name]]
            groups[tuple(same)] = None
    return list(groups)


def _write_stage(
    directory: Path,
    loaded: LoadedPolicy,
    stage: Stage,
    model: ir.Model,
    sites: Mapping[str, TargetSite],
    plan: TargetPlan,
) -> tuple[StageSpec, LoweredGraph]:
    between = _between(loaded) if plan.activations == "fp16" else frozenset()
    sampler = loaded.interface.sampler
    outputs = _halved(stage.outputs, between)
    if stage.name == sampler.stage:
        outputs = (*outputs, next_state_spec(sampler))
    lowered = lower_graph_(
        model, sites, plan.activations, between, stage=stage.name, embedding=plan.embedding
    )
    if stage.name == sampler.stage:
        add_next_state_(model, sampler)
    target = target_named(plan.target)
    check_graph(model, stage.name, target, formats_of(board_named(plan.board).compute_capability))
    file, *_ = save_graph(model, directory / f"{stage.name}.onnx")
    spec = StageSpec(
        name=stage.name, file=file, repeat=stage.repeat, inputs=_halved(stage.inputs, between),
        outputs=outputs,
    )  # fmt: skip
    return spec, lowered


@dataclass(frozen=True)
class LoweredGraph:
    """What became of a graph: where its sites are, and its tables of fewer bits than half precision."""

    placed: tuple[PlacedSite, ...]
    embeddings: tuple[EmbeddingFormat, ...]


def lower_graph_(
    model: ir.Model, sites: Mapping[str, TargetSite], activations: str, half_io: frozenset[str],
    *, stage: str = "", embedding: str = "half",
) -> LoweredGraph:  # fmt: skip
    """Turn a graph with marked sites into a strongly typed one."""
    narrow_doubles_(model)
    shape_attention_(model)
    placed, final = place_sites_(model, sites, activations)
    tables, dequantized = narrow_embeddings_(model, stage, embedding, activations)
    to_half_(model, activations, final | dequantized, half_io)
    return LoweredGraph(placed, tables)


def _between(loaded: LoadedPolicy) -> frozenset[str]:
    """Return the float tensors that only travel from stage to stage."""
    made = {spec.name for stage in loaded.stages for spec in stage.outputs}
    read = {spec.name for stage in loaded.stages for spec in stage.inputs}
    return frozenset((made & read) - {_sampled(loaded.interface.sampler)})


def _sampled(sampler: EulerSampler) -> str:
    return sampler.velocity


def _halved(specs: tuple[TensorSpec, ...], between: frozenset[str]) -> tuple[TensorSpec, ...]:
    return tuple(
        msgspec.structs.replace(spec, dtype="float16")
        if spec.name in between and spec.dtype == "float32"
        else spec
        for spec in specs
    )


def _formats(placed: tuple[PlacedSite, ...], stage: str, plan: TargetPlan) -> list[SiteFormat]:
    entries = {entry.site: entry for entry in plan.entries}
    return [
        SiteFormat(
            site=place.site, stage=stage, node=place.node, format=entries[place.site].format,
            weight_bytes=entries[place.site].weight_bytes, reason=entries[place.site].reason,
        )
        for place in placed
    ]  # fmt: skip


def _require_all(sites: Mapping[str, TargetSite], formats: list[SiteFormat]) -> None:
    missing = sites.keys() - {entry.site for entry in formats}
    if missing:
        raise explain(
            min(missing),
            "planned, but no stage's graph contains it",
            remedy="this is a defect of the family's sites or stages: report it",
        )
