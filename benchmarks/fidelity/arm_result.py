"""What is kept of an arm: one JSON file each, filled step by step, so that a rerun does only what is missing."""

from __future__ import annotations

from pathlib import Path

import msgspec

from quantvla.evaluate.results import PairResult, TaskResult
from quantvla.fidelity.compare import ArmComparison
from quantvla.fidelity.smoothness import Smoothness
from quantvla.runtime.files import write_atomic

REFERENCE = "float"


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """What a command took: wall time, processor time of all threads, peak resident memory of its process."""

    command: str
    wall_s: float
    cpu_s: float
    peak_rss_gib: float


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of the weights, scales counted. ``linear_bytes``: all linears that inference reads, float
    ones in half precision. ``effective_bits``: bits per weight of the quantized sites.
    """

    quantized_sites: int
    quantized_bytes: int
    quantized_half_bytes: int
    effective_bits: float
    linear_bytes: int
    linear_half_bytes: int


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """The arm's part of a comparison, and what it was measured on."""

    frames: int
    noises: int
    seed: int
    set_sha256: str
    reference_sha256: str
    dimensions: tuple[str, ...]
    reference_smoothness: Smoothness
    result: ArmComparison | None


class Bed(msgspec.Struct, frozen=True, kw_only=True):
    """Closed loop on one test bed. ``pair``: against the float arm on the same episodes (None for itself)."""

    perturbation: dict[str, float]
    denoise_steps: int | None
    seed: int
    success: TaskResult
    tasks: dict[str, TaskResult]
    pair: PairResult | None
    smoothness: Smoothness | None
    arm_sha256: str
    episodes_per_minute: float | None = None


class ArmRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The content of ``results/<arm>.json``. ``simulated``: runs in torch only, it has no engine."""

    arm: str
    recipe: str
    simulated: bool
    source_sha256: str
    compile_key: str = ""
    quantize: Cost | None = None
    size: Size | None = None
    engine_bytes: int | None = None
    compared: Compared | None = None
    beds: dict[str, Bed] = {}
    versions: dict[str, str] = {}
    machine: str = ""


def read_record(directory: Path, arm: str) -> ArmRecord | None:
    """Return what is kept of an arm, None if nothing is."""
    path = directory / f"{arm}.json"
    return msgspec.json.decode(path.read_bytes(), type=ArmRecord) if path.is_file() else None


def write_record(directory: Path, record: ArmRecord) -> None:
    """Write the arm's file, whole or not at all."""
    encoded = msgspec.json.format(msgspec.json.encode(record), indent=1)
    write_atomic(directory / f"{record.arm}.json", encoded + b"\n")
