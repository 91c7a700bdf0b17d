"""Is there room to build? Said before the first stage, not after the last."""

from __future__ import annotations

import shutil
from pathlib import Path

from quantvla.runtime.errors import explain
from quantvla.runtime.machine import available_memory_bytes
from quantvla.runtime.manifest import Manifest, StageSpec

_MEMORY_FACTOR = 3.0  # the builder holds the graph's weights, its own copies and the plan


def _stage_bytes(engine: Path, manifest: Manifest, stage: StageSpec) -> int:
    return sum(
        (engine / name).stat().st_size for name in manifest.files if name.startswith(stage.file)
    )


def require_room(
    engine: Path, manifest: Manifest, stages: list[StageSpec], workspace_mib: int | None
) -> None:
    """Raise `QuantVLAError` unless disk and memory are enough to build ``stages``."""
    if not stages:
        return
    sizes = [_stage_bytes(engine, manifest, stage) for stage in stages]
    free = shutil.disk_usage(engine).free
    if free < 2 * sum(sizes):
        raise explain(
            engine, f"building needs about {2 * sum(sizes) >> 20} MiB of disk", got=f"{free >> 20} MiB free",
            remedy="free space, or copy the engine to a larger disk",
        )  # fmt: skip
    memory, workspace = available_memory_bytes(), (workspace_mib or 0) << 20
    needed = int(_MEMORY_FACTOR * max(sizes)) + workspace
    if memory is not None and memory < needed:
        raise explain(
            engine, f"building needs about {needed >> 20} MiB of memory", got=f"{memory >> 20} MiB available",
            remedy="close other programs, add swap, or set a smaller --workspace",
        )  # fmt: skip
