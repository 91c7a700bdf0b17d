"""`quantvla export`: a float or quantized checkpoint -> an engine directory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from msgspec import structs
from torch import nn

from quantvla.calib_sets import RobotSpec
from quantvla.checkpoint import is_quantized, load_quantized
from quantvla.export import lowering_cpu
from quantvla.export.graphs import export_graph, save_graph
from quantvla.export.guidance import export_guidance
from quantvla.export.half_scales import store_half_scales_
from quantvla.families import load_policy
from quantvla.families.base import LoadedPolicy, replaced
from quantvla.progress import Progress
from quantvla.quantized_linear import QuantizedLinear
from quantvla.runtime.errors import explain, nearest
from quantvla.runtime.files import atomic_directory, sha256_file, sha256_tree
from quantvla.runtime.manifest import (
    MANIFEST_FILE,
    SCHEMA_VERSION,
    Manifest,
    Source,
    StageSpec,
    encode_manifest,
)
from quantvla.runtime.wiring import check_wiring
from quantvla.versions import compiler_versions

Lowering = Callable[[str, QuantizedLinear], nn.Module]
TARGETS: dict[str, Lowering] = {"cpu": lowering_cpu.lower}
FLOAT_RECIPE = "float"


def export_engine(
    checkpoint: Path,
    target: str,
    output: Path,
    *,
    overwrite: bool = False,
    guidance: bool = False,
    progress: Progress = lambda _what, _done, _total: None,
) -> Manifest:
    """Write the engine of a checkpoint for ``target`` to ``output``, whole or not at all.

    A LeRobot checkpoint gives the float engine, a quantized checkpoint the integer one.
    ``guidance`` adds the graph for guided real-time chunking.
    """
    if target not in TARGETS:
        raise explain(f"target {target!r}", "unknown", remedy=nearest(target, TARGETS))
    if output.exists() and not overwrite:
        raise explain(output, "already exists", remedy="choose another output or pass --overwrite")
    if is_quantized(checkpoint):
        loaded, card = load_quantized(checkpoint)
        loaded = with_names(loaded, card.calibration.robot)
        recipe, source = card.recipe.name, card.source_sha256
        calibration: str | None = card.calibration.sha256
    else:
        loaded, recipe, source, calibration = (
            load_policy(checkpoint),
            FLOAT_RECIPE,
            sha256_tree(checkpoint),
            None,
        )
    with atomic_directory(output, overwrite=overwrite) as directory:
        stages = _write_stages(directory, loaded, TARGETS[target], progress)
        guided = export_guidance(directory, loaded) if guidance else None
        for name, content in loaded.interface.files.items():
            (directory / name).write_bytes(content)
        manifest = _manifest(
            directory, loaded, stages, recipe, target,
            Source(checkpoint_sha256=source, policy_type=loaded.family, calibration_sha256=calibration),
        )  # fmt: skip
        manifest = structs.replace(manifest, guidance=guided)
        check_wiring(manifest)
        (directory / MANIFEST_FILE).write_bytes(encode_manifest(manifest))
    return manifest


def with_names(loaded: LoadedPolicy, robot: RobotSpec) -> LoadedPolicy:
    """Return the policy with the names of its state and action entries, which a checkpoint lacks and a robot has."""
    interface = loaded.interface
    state, action = interface.state, interface.action
    if not state.names and robot.state.dim == state.dim:
        state = structs.replace(state, names=robot.state.names)
    if not action.names and robot.action is not None and robot.action.dim == action.dim:
        action = structs.replace(action, names=robot.action.names)
    return replace(loaded, interface=replace(interface, state=state, action=action))


def lowered(loaded: LoadedPolicy, lower: Lowering) -> dict[str, nn.Module]:
    """Return the kernels' modules for all integer sites in place in the policy."""
    return {
        name: lower(name, module)
        for name, module in loaded.policy.named_modules()
        if isinstance(module, QuantizedLinear)
    }


def _write_stages(
    directory: Path, loaded: LoadedPolicy, lower: Lowering, progress: Progress
) -> tuple[StageSpec, ...]:
    specs = []
    with replaced(loaded.policy, lowered(loaded, lower)):
        for index, stage in enumerate(loaded.stages):
            progress(f"exporting {stage.name}", index, len(loaded.stages))
            model = export_graph(stage)
            store_half_scales_(model)
            file, *_ = save_graph(model, directory / f"{stage.name}.onnx")
            specs.append(
                StageSpec(
                    name=stage.name,
                    file=file,
                    repeat=stage.repeat,
                    inputs=stage.inputs,
                    outputs=stage.outputs,
                )
            )
    progress("exporting", len(loaded.stages), len(loaded.stages))
    return tuple(specs)


def _manifest(
    directory: Path,
    loaded: LoadedPolicy,
    stages: tuple[StageSpec, ...],
    recipe: str,
    target: str,
    source: Source,
) -> Manifest:
    interface = loaded.interface
    return Manifest(
        schema_version=SCHEMA_VERSION,
        family=loaded.family,
        recipe=recipe,
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
        source=source,
        versions=compiler_versions(),
    )
