"""Quantize and export of an arm: the product's own commands, each in a fresh process that is measured."""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

import msgspec
from arm_result import Cost, Size

import quantvla
from quantvla.runtime.errors import explain
from quantvla.runtime.files import write_atomic
from quantvla.versions import compiler_versions

CARD_FILE = "quantized.json"


class _Scheme(msgspec.Struct):
    name: str


class _Entry(msgspec.Struct):
    scheme: _Scheme
    bytes_before: int
    bytes_after: int


class _Plan(msgspec.Struct):
    entries: tuple[_Entry, ...]


class _Card(msgspec.Struct):
    plan: _Plan


@dataclass(frozen=True)
class Sources:
    """What is compiled, on what: a LeRobot checkpoint and a calibration set."""

    checkpoint: Path
    calibration: Path
    frames: int
    source_sha256: str


def compile_key(sources: Sources, recipe: str) -> str:
    """Return what a compiled arm depends on: checkpoint, set, frames, recipe, versions (not the code: --fresh)."""
    bundled = Path(quantvla.__file__).parent / "recipes" / f"{recipe}.toml"
    content = bundled if bundled.is_file() else Path(recipe)
    card = sources.calibration / "card.json"
    return _digest(
        content.read_bytes(),
        card.read_bytes() if card.is_file() else str(sources.calibration).encode(),
        f"{sources.source_sha256} {sources.frames} {recipe}".encode(),
    )


def float_key(source_sha256: str) -> str:
    """Return what the float engine depends on: the checkpoint and the versions."""
    return _digest(source_sha256.encode())


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join((*parts, repr(compiler_versions()).encode()))).hexdigest()


def quantize_arm(sources: Sources, recipe: str, output: Path, key: str) -> Cost | None:
    """Quantize with ``recipe`` unless ``output`` was made with the same key; returns the cost if it ran."""
    return _make(
        output, key,
        "quantize", "--policy.path", str(sources.checkpoint), "--calib", str(sources.calibration),
        "--frames", str(sources.frames), "--recipe", recipe, "-o", str(output), "--overwrite",
    )  # fmt: skip


def export_arm(checkpoint: Path, output: Path, key: str) -> Cost | None:
    """Export a checkpoint unless ``output`` was made with the same key; returns the cost if it ran."""
    return _make(output, key, "export", str(checkpoint), "-o", str(output), "--overwrite")


def measured_size(quantized: Path) -> Size:
    """Return the bytes of the weights by the plan of a quantized checkpoint."""
    entries = msgspec.json.decode((quantized / CARD_FILE).read_bytes(), type=_Card).plan.entries
    kept = [entry for entry in entries if entry.scheme.name != "dropped"]
    integer = [entry for entry in kept if entry.scheme.name != "float"]
    bytes_after = sum(entry.bytes_after for entry in integer)
    bytes_before = sum(entry.bytes_before for entry in integer)
    return Size(
        quantized_sites=len(integer),
        quantized_bytes=bytes_after,
        quantized_half_bytes=bytes_before,
        effective_bits=16 * bytes_after / bytes_before if bytes_before else 16.0,
        linear_bytes=sum(entry.bytes_after for entry in kept),
        linear_half_bytes=sum(entry.bytes_before for entry in kept),
    )


def directory_bytes(directory: Path) -> int:
    """Return the bytes of all files of a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _make(output: Path, key: str, *arguments: str) -> Cost | None:
    """Run a command unless its output is there and was made with ``key``."""
    stamp = output.with_name(output.name + ".key")
    if output.is_dir() and stamp.is_file() and stamp.read_text() == key:
        return None
    cost = run_command(*arguments)
    write_atomic(stamp, key.encode())
    return cost


def run_command(*arguments: str) -> Cost:
    """Run a quantvla command; its own messages go to stderr. Raises `QuantVLAError` if it fails."""
    shown = shlex.join(("quantvla", *arguments))
    print(f"$ {shown}", file=sys.stderr)
    start = time.monotonic()
    process = Popen([sys.executable, "-m", "quantvla", *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise explain(shown, "failed", got=f"status {os.waitstatus_to_exitcode(status)}",
                      remedy="its message is above")  # fmt: skip
    return Cost(
        command=shown,
        wall_s=round(time.monotonic() - start, 2),
        cpu_s=round(usage.ru_utime + usage.ru_stime, 2),
        peak_rss_gib=round(usage.ru_maxrss / 2**20, 3),
    )
