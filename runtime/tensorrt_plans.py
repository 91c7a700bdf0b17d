"""Built engines ("plans") inside an engine directory: where they are, what they were built from and for.

A plan runs on one GPU architecture with one TensorRT version. Plans lie in
``plans/<key>/<stage>.plan``, the record of their builds beside them in ``build.json``; the key names
GPU, library and version, so an engine directory can hold plans for several machines.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from quantvla.runtime.errors import explain
from quantvla.runtime.files import sha256_file, write_atomic
from quantvla.runtime.tensorrt_layers import SiteResult

PLANS, RECORD_FILE, TIMING_FILE = "plans", "build.json", "timing.cache"
SCHEMA_VERSION = 1


class Machine(msgspec.Struct, frozen=True):
    """What plans are built for. ``gpu``: its name, or "any SM<n>" for plans built without one."""

    library: str
    version: str
    compute_capability: int
    gpu: str

    @property
    def key(self) -> str:
        """The name of the plans' directory."""
        name = f"sm{self.compute_capability}-{self.gpu}-{self.library}-{self.version}"
        return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


class StagePlan(msgspec.Struct, frozen=True, kw_only=True):
    """One built stage. ``source_sha256``: of its graph and weights; ``scratch_bytes``: device memory beside weights."""

    stage: str
    source_sha256: str
    plan_sha256: str
    plan_bytes: int
    build_s: float
    options: str
    account: str
    layers: dict[str, int]
    sites: tuple[SiteResult, ...]
    warnings: tuple[str, ...]


class BuildRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The content of ``build.json``."""

    schema_version: int
    machine: Machine
    stages: tuple[StagePlan, ...] = ()

    def stage(self, name: str) -> StagePlan | None:
        """Return the record of a stage, None before it was built."""
        return next((plan for plan in self.stages if plan.stage == name), None)

    def with_stage(self, plan: StagePlan) -> BuildRecord:
        """Return the record with ``plan`` added or replaced."""
        others = tuple(old for old in self.stages if old.stage != plan.stage)
        return msgspec.structs.replace(self, stages=(*others, plan))


def plan_directory(engine: Path, machine: Machine) -> Path:
    """Return where the plans of ``machine`` are."""
    return engine / PLANS / machine.key


def read_record(engine: Path, machine: Machine) -> BuildRecord:
    """Return the record of earlier builds, an empty one if there is none or it is of another version."""
    found = _decode(plan_directory(engine, machine) / RECORD_FILE)
    if found is not None and found.machine == machine:
        return found
    return BuildRecord(schema_version=SCHEMA_VERSION, machine=machine)


def read_records(engine: Path) -> tuple[BuildRecord, ...]:
    """Return the records of all machines that an engine directory was built for."""
    paths = sorted((engine / PLANS).glob(f"*/{RECORD_FILE}"))
    return tuple(record for path in paths if (record := _decode(path)) is not None)


def _decode(path: Path) -> BuildRecord | None:
    """Return the record in a file, None if there is none of this version."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=BuildRecord)
    except (OSError, msgspec.ValidationError, msgspec.DecodeError):
        return None
    return found if found.schema_version == SCHEMA_VERSION else None


def write_record(engine: Path, record: BuildRecord) -> None:
    """Write the record beside the plans."""
    path = plan_directory(engine, record.machine) / RECORD_FILE
    write_atomic(path, msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")


def find_machine(engine: Path, here: Machine) -> Machine:
    """Return what the plans for this machine were built for: its own GPU, or any of its architecture."""
    anywhere = msgspec.structs.replace(here, gpu=any_gpu(here.compute_capability))
    found = [m for m in (here, anywhere) if read_record(engine, m).stages]
    return found[0] if found else here


def any_gpu(compute_capability: int) -> str:
    """Return what stands for the GPU's name in plans that were built without one."""
    return f"any SM{compute_capability}"


def require_plan(engine: Path, machine: Machine, stage: str, source_sha256: str) -> Path:
    """Return the plan of a stage, checked; raises `QuantVLAError` with the command that builds it.

    Refused: no plan for this GPU and version (naming those there are), a plan of another graph, a
    plan that changed since it was built.
    """
    rebuild = f"run: quantvla build {engine}"
    record = read_record(engine, machine)
    plan = record.stage(stage)
    if plan is None:
        others = sorted(path.name for path in (engine / PLANS).glob("*") if path.is_dir())
        raise explain(
            engine, f"stage {stage} is not built for {machine.key}",
            got=", ".join(others) or "no plan at all", remedy=rebuild,
        )  # fmt: skip
    path = plan_directory(engine, machine) / f"{stage}.plan"
    if plan.source_sha256 != source_sha256:
        raise explain(path, "was built from another graph than the engine holds", remedy=rebuild)
    if not path.is_file() or sha256_file(path) != plan.plan_sha256:
        raise explain(path, "missing or changed since it was built", remedy=rebuild)
    return path


def source_sha256(engine: Path, files: dict[str, str], stage_file: str) -> str:
    """Return one hash for a stage's graph and weights, from the manifest's checksums."""
    parts = [files[name] for name in sorted(files) if name.startswith(stage_file)]
    if not parts:
        raise explain(engine / stage_file, "has no checksum", remedy="export the engine again")
    return "+".join(part[:32] for part in parts)
