"""`quantvla export`: a float or quantized checkpoint -> an engine directory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from msgspec import structs
from torch import nn

from quantvla.export import lowering_cpu
from quantvla.export.cameras import cameras_apart
from quantvla.export.denoise_loop import export_loop
from quantvla.export.graphs import save_graph
from quantvla.export.guidance import export_guidance
from quantvla.export.half_scales import store_half_scales_
from quantvla.export.kernel_choice import Wanted, choose_kernels, stock_sites
from quantvla.export.native import derive_native
from quantvla.export.panels import store_panels_
from quantvla.export.rewrite_report import (
    REWRITES_FILE,
    StageRewrites,
    encode_rewrites,
    unfused_attention,
)
from quantvla.export.rewrites import FUSE_CPU, Rewrite
from quantvla.export.source import SourcePolicy, load_source
from quantvla.export.stages import StageGraph, build_graphs
from quantvla.families.base import LoadedPolicy, replaced
from quantvla.latency_table import LatencyTable
from quantvla.progress import Progress
from quantvla.quantized_linear import QuantizedLinear, integer_weights
from quantvla.runtime.errors import explain, nearest
from quantvla.runtime.files import atomic_directory, sha256_file
from quantvla.runtime.manifest import (
    MANIFEST_FILE,
    SCHEMA_VERSION,
    KernelChoices,
    Manifest,
    StageSpec,
    encode_manifest,
)
from quantvla.runtime.wiring import check_wiring
from quantvla.schedule import Schedule
from quantvla.versions import compiler_versions

Lowering = Callable[[str, QuantizedLinear], nn.Module]
TARGETS: dict[str, Lowering] = {"cpu": lowering_cpu.lower}
FUSIONS: dict[str, tuple[Rewrite, ...]] = {"cpu": FUSE_CPU}
"""Rewrites into operators that only this target has; the others get standard operators."""
OWN_KERNELS = ("cpu",)
"""Targets that `runtime/kernels` is for."""


def export_engine(
    checkpoint: Path,
    target: str,
    output: Path,
    *,
    overwrite: bool = False,
    guidance: bool = False,
    kernels: Wanted = "auto",
    profile: LatencyTable | None = None,
    schedule: Schedule | None = None,
    one_camera: bool = False,
    progress: Progress = lambda _what, _done, _total: None,
) -> Manifest:
    """Write the engine of a checkpoint for ``target`` to ``output``, whole or not at all.

    A LeRobot checkpoint gives the float engine, a quantized checkpoint the integer one.
    ``guidance`` adds the graph for guided real-time chunking. ``kernels`` and ``profile`` decide what
    integer linears are exported as, see `choose_kernels`. The engine denoises at the times of ``schedule``, if given.
    With ``one_camera`` the vision stage takes cameras one by one, see `quantvla.runtime.reuse`.
    """
    if target not in TARGETS:
        raise explain(f"target {target!r}", "unknown", remedy=nearest(target, TARGETS))
    if output.exists() and not overwrite:
        raise explain(output, "already exists", remedy="choose another output or pass --overwrite")
    source = load_source(checkpoint, schedule)
    with atomic_directory(output, overwrite=overwrite) as directory:
        loaded = cameras_apart(source.loaded) if one_camera else source.loaded
        context = loaded.stage(loaded.interface.sampler.stage).inputs if guidance else ()
        graphs, choices = _stage_graphs(
            directory, loaded, target, progress, kernels, profile,
            keep=[spec.name for spec in context],
        )  # fmt: skip
        blocks = {site: weight.block for site, weight in integer_weights(loaded.policy).items()}
        own = kernels != "onnxruntime" and target in OWN_KERNELS
        stages = tuple(
            write_stage(directory, graph, blocks if own else None, stock_sites(choices))
            for graph in graphs
        )
        loop = export_loop(directory, stages[-1], loaded.interface.sampler)
        guided = export_guidance(directory, loaded) if guidance else None
        for name, content in loaded.interface.files.items():
            (directory / name).write_bytes(content)
        manifest = make_manifest(directory, source, stages, target)
        own_times = any(graph.only_own_times for graph in graphs)
        sampler = structs.replace(manifest.sampler, only_own_times=own_times)
        manifest = structs.replace(
            manifest, loop=loop, guidance=guided, sampler=sampler,
            kernels=choices if choices.sites else None,
        )  # fmt: skip
        check_wiring(manifest)
        (directory / MANIFEST_FILE).write_bytes(encode_manifest(manifest))
    return manifest


def lowered(loaded: LoadedPolicy, lower: Lowering) -> dict[str, nn.Module]:
    """Return the kernels' modules for all integer sites in place in the policy."""
    return {
        name: lower(name, module)
        for name, module in loaded.policy.named_modules()
        if isinstance(module, QuantizedLinear)
    }


def _stage_graphs(
    directory: Path,
    loaded: LoadedPolicy,
    target: str,
    progress: Progress,
    kernels: Wanted,
    profile: LatencyTable | None,
    keep: Sequence[str],
) -> tuple[tuple[StageGraph, ...], KernelChoices]:
    """Return every stage's graph and what its integer linears become; write the report of the rewrites."""
    fusions = FUSIONS.get(target, ())
    with replaced(loaded.policy, lowered(loaded, TARGETS[target])):
        graphs = build_graphs(loaded.stages, loaded.interface.sampler, fusions, progress, keep=keep)
    rewrites = [
        StageRewrites(
            graph.name, dict(graph.applied), unfused_attention(graph.model) if fusions else ()
        )
        for graph in graphs
    ]
    (directory / REWRITES_FILE).write_bytes(encode_rewrites(rewrites))
    return graphs, choose_kernels(graphs, integer_weights(loaded.policy), kernels, profile)


def write_stage(
    directory: Path,
    graph: StageGraph,
    blocks: Mapping[str, int] | None,
    stock: Collection[str] = frozenset(),
) -> StageSpec:
    """Write a stage's graph and, with ``blocks`` (of the integer sites), the one of own operators.

    The sites in ``stock`` keep the engine library's operator there.
    """
    integer = blocks is not None and store_panels_(graph.model, blocks, stock) > 0
    store_half_scales_(graph.model)
    file, *_ = save_graph(graph.model, directory / f"{graph.name}.onnx")
    native = ""
    if integer:
        native = f"{graph.name}.native.onnx"
        derive_native(directory / file, directory / native)
    return StageSpec(
        name=graph.name,
        file=file,
        repeat=graph.repeat,
        inputs=graph.inputs,
        outputs=graph.outputs,
        native=native,
    )


def make_manifest(
    directory: Path, source: SourcePolicy, stages: tuple[StageSpec, ...], target: str
) -> Manifest:
    """Return the manifest of the engine whose files are in ``directory``."""
    interface = source.loaded.interface
    return Manifest(
        schema_version=SCHEMA_VERSION,
        family=source.loaded.family,
        recipe=source.recipe,
        target=target,
        stages=stages,
        sampler=interface.sampler,
        preprocess=interface.preprocess,
        postprocess=interface.postprocess,
        statistics=interface.statistics,
        cameras=interface.cameras,
        state=interface.state,
        task_key=interface.task_key,
        action=interface.action,
        files={
            path.name: sha256_file(path) for path in sorted(directory.iterdir()) if path.is_file()
        },
        source=source.origin,
        versions=compiler_versions(),
    )
