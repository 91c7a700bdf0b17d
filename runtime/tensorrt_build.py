"""`quantvla build`: the graphs of an engine directory -> plans for one GPU and one TensorRT version.

Needs the runtime install and a TensorRT, nothing else. Each stage is written whole or not at all and
kept, so a killed build continues where it was.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantvla.runtime.errors import QuantVLAError, explain
from quantvla.runtime.files import sha256_file, write_atomic
from quantvla.runtime.gpu import find_gpu
from quantvla.runtime.manifest import Manifest, StageSpec, check_files, read_manifest
from quantvla.runtime.site_formats import SiteFormat, SiteFormats, read_formats
from quantvla.runtime.targets import Target, formats_of, target_named, target_serving
from quantvla.runtime.tensorrt_layers import (
    Layer,
    SiteResult,
    layers_of_json,
    layers_of_listing,
    site_results,
)
from quantvla.runtime.tensorrt_library import (
    BuildMessages,
    Library,
    load_library,
    make_logger,
    make_monitor,
)
from quantvla.runtime.tensorrt_plans import (
    TIMING_FILE,
    BuildRecord,
    Machine,
    StagePlan,
    any_gpu,
    plan_directory,
    read_record,
    source_sha256,
    write_record,
)
from quantvla.runtime.tensorrt_room import require_room

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BuildOptions:
    """``compute_capability`` None builds for the GPU of this machine; a number needs no GPU (tensorrt_rtx only).

    ``workspace_mib``: most scratch memory a layer may take, None for the library's choice;
    ``level``: the builder's optimization level, None for its default.
    """

    compute_capability: int | None = None
    workspace_mib: int | None = None
    level: int | None = None
    allow_fallback: bool = False


def build_engine(
    engine: Path,
    options: BuildOptions = BuildOptions(),
    *,
    progress: Progress = lambda _what, _done, _total: None,
) -> BuildRecord:
    """Build all stages of an engine directory that are not built yet; returns the record of all.

    Raises `QuantVLAError`: engine damaged or for another target, library too old, GPU not planned for,
    not enough memory or disk (before anything is built), a graph the parser refuses (naming the site),
    or a linear that did not get its planned format.
    """
    manifest = read_manifest(engine)
    target = target_named(manifest.target)
    formats = read_formats(engine)
    check_files(engine, manifest)
    library = load_library(target.library)
    _require_version(engine, library, target)
    machine = choose_machine(library, target, formats, options.compute_capability)
    record = read_record(engine, machine)
    waiting = [s for s in manifest.stages if not _is_built(engine, manifest, s, record, options)]
    require_room(engine, manifest, waiting, options.workspace_mib)
    for stage in waiting:
        plan = _build_stage(
            engine, manifest, stage, formats.of_stage(stage.name), library, machine, options, progress
        )  # fmt: skip
        record = record.with_stage(plan)
        write_record(engine, record)
    return record


def choose_machine(
    library: Library, target: Target, formats: SiteFormats, compute_capability: int | None
) -> Machine:
    """Return what is built for: the GPU of this machine, or any GPU of ``compute_capability``."""
    if compute_capability is None:
        gpu = find_gpu()
        machine = Machine(library.name, library.version, gpu.compute_capability, gpu.name)
    else:
        name = any_gpu(compute_capability)
        machine = Machine(library.name, library.version, compute_capability, name)
        if not hasattr(library.trt, "ComputeCapability"):
            raise explain(
                f"SM{compute_capability}", f"{library.name} builds for the GPU of this machine only",
                remedy="build on the robot, without --compute-capability",
            )  # fmt: skip
    if machine.compute_capability not in formats.compute_capabilities:
        planned = ", ".join(f"SM{sm}" for sm in formats.compute_capabilities)
        raise explain(
            f"SM{machine.compute_capability}", f"this engine was planned for {planned}",
            remedy=_plan_for(machine.compute_capability, target),
        )  # fmt: skip
    return machine


def _plan_for(compute_capability: int, target: Target) -> str:
    """Return what makes an engine for a GPU that one of ``target`` was not planned for."""
    serving = target_serving(compute_capability)
    if serving is None:
        return "no target serves that GPU, see `quantvla targets`"
    if serving is not target:
        return f"export it again with --target {serving.name}"
    formats = ", ".join(formats_of(compute_capability))
    return f"export it again in formats that GPU has ({formats}), with --board or --precision"


def _require_version(engine: Path, library: Library, target: Target) -> None:
    if library.release < target.version:
        wanted = ".".join(map(str, target.version))
        raise explain(
            engine, f"its graphs are written for {library.name} {wanted} or newer", got=library.version,
            remedy="upgrade TensorRT (JetPack), or export for another target",
        )  # fmt: skip


def _options_key(options: BuildOptions) -> str:
    return f"workspace={options.workspace_mib} level={options.level}"


def _is_built(
    engine: Path, manifest: Manifest, stage: StageSpec, record: BuildRecord, options: BuildOptions
) -> bool:
    plan = record.stage(stage.name)
    path = plan_directory(engine, record.machine) / f"{stage.name}.plan"
    return (
        plan is not None
        and plan.source_sha256 == source_sha256(engine, manifest.files, stage.file)
        and plan.options == _options_key(options)
        and (options.allow_fallback or all(site.kept for site in plan.sites))
        and path.is_file()
        and sha256_file(path) == plan.plan_sha256
    )


def _build_stage(
    engine: Path, manifest: Manifest, stage: StageSpec, sites: tuple[SiteFormat, ...],
    library: Library, machine: Machine, options: BuildOptions, progress: Progress,
) -> StagePlan:  # fmt: skip
    messages = BuildMessages()
    start = time.monotonic()
    logger = make_logger(library, messages)
    builder = library.trt.Builder(logger)
    network = _parse(library, builder, logger, engine / stage.file, stage, messages)
    config = _configure(library, builder, network, stage, machine, options)
    config.progress_monitor = make_monitor(
        library, lambda phase, done, total: progress(f"{stage.name}: {phase}"[:40], done, total)
    )
    cache = plan_directory(engine, machine) / TIMING_FILE
    timing = config.create_timing_cache(cache.read_bytes() if cache.is_file() else b"")
    if timing is not None:
        config.set_timing_cache(timing, ignore_mismatch=False)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise _refused(engine / stage.file, stage, messages, sites)
    data = bytes(serialized)
    account, layers = _account(library, data, messages)
    results = site_results(sites, layers)
    if not options.allow_fallback:
        _require_kept(engine, stage, results)
    write_atomic(plan_directory(engine, machine) / f"{stage.name}.plan", data)
    if timing is not None:
        write_atomic(cache, bytes(timing.serialize()))
    return StagePlan(
        stage=stage.name, source_sha256=source_sha256(engine, manifest.files, stage.file),
        plan_sha256=sha256_file(plan_directory(engine, machine) / f"{stage.name}.plan"),
        plan_bytes=len(data), build_s=round(time.monotonic() - start, 3), options=_options_key(options),
        account=account, layers=dict(Counter(layer.kind for layer in layers).most_common()),
        sites=results, warnings=tuple(messages.warnings[:20]),
    )  # fmt: skip


def _parse(
    library: Library,
    builder: Any,
    logger: Any,
    path: Path,
    stage: StageSpec,
    messages: BuildMessages,
) -> Any:
    trt = library.trt
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        first = parser.get_error(0) if parser.num_errors else None
        node = f"node {first.node_name()} ({first.node_operator()})" if first else "the file"
        raise explain(
            f"stage {stage.name}, {node}", f"the ONNX parser of {library.name} {library.version} refuses it",
            got=" ".join(str(first.desc()).split()) if first else messages.errors[-1:],
            remedy="leave that site in float in the recipe, export with --precision float, or use a newer TensorRT",
        )  # fmt: skip
    return network


def _configure(
    library: Library,
    builder: Any,
    network: Any,
    stage: StageSpec,
    machine: Machine,
    options: BuildOptions,
) -> Any:
    trt = library.trt
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if options.level is not None:
        config.builder_optimization_level = options.level
    if options.compute_capability is not None:
        config.num_compute_capabilities = 1
        capability = getattr(trt.ComputeCapability, f"SM{options.compute_capability}", None)
        if capability is None:
            raise explain(
                f"SM{options.compute_capability}", f"{library.name} {library.version} does not build for it",
                remedy="choose a GPU that `quantvla targets` lists",
            )  # fmt: skip
        config.set_compute_capability(capability, 0)
    shapes = {spec.name: spec.shape for spec in stage.inputs}
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    if any(-1 in tuple(tensor.shape) for tensor in inputs):
        profile = builder.create_optimization_profile()
        for tensor in inputs:
            shape = shapes[tensor.name]
            profile.set_shape(tensor.name, shape, shape, shape)
        config.add_optimization_profile(profile)
    return config


def _refused(
    path: Path, stage: StageSpec, messages: BuildMessages, sites: tuple[SiteFormat, ...]
) -> QuantVLAError:
    text = " ".join((messages.errors or ["no message"])[0].split())
    named = [site.site for site in sites if site.node in " ".join(messages.errors)]
    thing = f"stage {stage.name}" + (f", site {named[0]}" if named else "")
    if "memory" in text.lower() or "workspace" in text.lower():
        remedy = "give a larger --workspace or close other programs"
    else:
        remedy = "export with another --precision, or report it with this message"
    return explain(thing, f"TensorRT cannot build {path.name}", got=text, remedy=remedy)


def _account(
    library: Library, plan: bytes, messages: BuildMessages
) -> tuple[str, tuple[Layer, ...]]:
    """Return (where it is from, layers): the inspector's account if the engine loads here, else the listing."""
    listing = messages.layers
    try:
        find_gpu()
    except QuantVLAError:
        return "builder's listing", layers_of_listing(listing)
    quiet = BuildMessages()
    runtime = library.trt.Runtime(make_logger(library, quiet))
    loaded = runtime.deserialize_cuda_engine(plan)
    if loaded is None:
        return "builder's listing", layers_of_listing(listing)
    inspector = loaded.create_engine_inspector()
    text = inspector.get_engine_information(library.trt.LayerInformationFormat.JSON)
    return "engine inspector", layers_of_json(text)


def _require_kept(engine: Path, stage: StageSpec, results: tuple[SiteResult, ...]) -> None:
    lost = [result for result in results if not result.kept]
    if not lost:
        return
    listed = "; ".join(f"{r.site} planned {r.planned}, runs {r.ran}" for r in lost[:5])
    more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
    raise explain(
        f"{engine}, stage {stage.name}", f"{len(lost)} of {len(results)} linears did not get their format",
        got=listed + more, remedy="pass --allow-fallback to keep the plan as it is, or plan them differently",
    )  # fmt: skip
