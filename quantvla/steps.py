"""Steps of a longer run: each leaves one output, and is reused while its inputs and the code are unchanged."""

from __future__ import annotations

import hashlib
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.console import Console

import quantvla
from quantvla.runtime.files import sha256_file, sha256_tree, write_atomic

RECORD_FILE = "steps.json"
_CODE = ("*.py", "*.toml", "*.jinja")
_LINKED = ("export", "runtime", "calib_sets")


@dataclass(frozen=True)
class Step:
    """One step: ``command`` is the command line that does the same; ``inputs`` all that the output depends on.

    ``work`` are partial results that a killed step continues from; they are kept while
    ``work_inputs`` (None: all inputs) are unchanged.
    """

    name: str
    title: str
    command: str
    output: Path
    inputs: tuple[str, ...]
    work: tuple[Path, ...] = ()
    work_inputs: tuple[str, ...] | None = None


@dataclass(frozen=True)
class FinishedStep:
    """A step that has its output: how long making it took, and whether that was in an earlier run."""

    step: Step
    duration_s: float
    reused: bool
    output_sha256: str


class _Record(msgspec.Struct, frozen=True):
    key: str
    work_key: str
    output_sha256: str | None
    duration_s: float


class StepRunner:
    """Runs steps in one directory and remembers them there. Says on stderr what runs, and the time taken."""

    def __init__(self, directory: Path, total: int) -> None:
        """Read what earlier runs left in ``directory``; ``total`` is the number of steps, for display."""
        self.finished: list[FinishedStep] = []
        self._total = total
        self._path = directory / RECORD_FILE
        self._records = _read_records(self._path)
        self._code = code_sha256()
        self._console = Console(stderr=True, highlight=False)

    def run(self, step: Step, make: Callable[[], None]) -> FinishedStep:
        """Call ``make`` unless the output is there, untouched, and was made from the same inputs."""
        key = self._key(step.inputs)
        work_key = self._key(step.inputs if step.work_inputs is None else step.work_inputs)
        position = f"[{len(self.finished) + 1}/{self._total}]"
        self._console.print(f"{position} {step.title}", markup=False, style="bold")
        self._console.print(f"  $ {step.command}", markup=False, style="dim", soft_wrap=True)
        record = self._records.get(step.name)
        found = _hash(step.output)
        if record and record.key == key and found and record.output_sha256 == found:
            done = FinishedStep(step, record.duration_s, True, found)
            self._console.print("  inputs unchanged, reused")
        else:
            _remove(step.output)
            if record is None or record.work_key != work_key:
                for path in step.work:
                    _remove(path)
            self._remember(step, _Record(key, work_key, None, 0.0))
            done = self._make(step, make)
            record = _Record(key, work_key, done.output_sha256, done.duration_s)
            self._remember(step, record)
            self._console.print(f"  done in {done.duration_s:.1f} s")
        self.finished.append(done)
        return done

    def _make(self, step: Step, make: Callable[[], None]) -> FinishedStep:
        start = time.monotonic()
        with redirect_stdout(sys.stderr):  # libraries print while they load
            make()
        duration_s = time.monotonic() - start
        digest = _hash(step.output)
        assert digest is not None, f"step {step.name} left no {step.output}"
        return FinishedStep(step, duration_s, False, digest)

    def _key(self, inputs: tuple[str, ...]) -> str:
        return hashlib.sha256("\0".join((self._code, *inputs)).encode()).hexdigest()

    def _remember(self, step: Step, record: _Record) -> None:
        self._records[step.name] = record
        encoded = msgspec.json.encode(self._records)
        write_atomic(self._path, msgspec.json.format(encoded, indent=1))


def code_sha256() -> str:
    """Return one SHA-256 over this package's source, so that a changed compiler makes its steps again."""
    root = Path(quantvla.__file__).parent
    digest = hashlib.sha256()
    for folder in (root, *((root / name).resolve() for name in _LINKED)):
        for path in sorted(path for pattern in _CODE for path in folder.rglob(pattern)):
            digest.update(path.name.encode() + b"\0" + bytes.fromhex(sha256_file(path)))
    return digest.hexdigest()


def _read_records(path: Path) -> dict[str, _Record]:
    """Return the records; a file that cannot be read only means that every step runs again."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, _Record])
    except (OSError, msgspec.ValidationError, msgspec.DecodeError):
        return {}


def _hash(path: Path) -> str | None:
    if path.is_dir():
        return sha256_tree(path)
    return sha256_file(path) if path.is_file() else None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
