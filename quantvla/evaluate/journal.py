"""The journal of an evaluation: one JSON line per (task, episode), so that a killed run resumes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from quantvla.fidelity.smoothness import Smoothness
from quantvla.runtime.closing import Closing
from quantvla.runtime.errors import explain

JOURNAL_VERSION = 1
_START_AGAIN = "choose another output, or delete the file to start again"


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the episodes of a journal have in common; a run resumes only a journal with its own header."""

    journal: int = JOURNAL_VERSION
    quantvla: str
    simulator: str
    seed: int
    execute: int | None
    arms: dict[str, str]
    perturbation: dict[str, float] = {}
    denoise_steps: int | None = None


class Outcome(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one arm did in one episode. An episode ends at success, so ``steps`` is then the success step."""

    success: bool
    steps: int
    total_reward: float
    smoothness: Smoothness | None = None


class EpisodeRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One (task, episode) run by all arms on the same environment seed and the same noise."""

    task: str
    episode: int
    environment_seed: int
    outcomes: dict[str, Outcome]


class Journal(Closing):
    """Append-only record of finished episodes. A context manager; every line is on the disk when `append` returns."""

    def __init__(self, path: Path, header: Header) -> None:
        """Open or create the journal at ``path``.

        A last line that was cut off by a kill is removed. Raises `QuantVLAError` if the journal
        is of another evaluation or damaged elsewhere.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.records: tuple[EpisodeRecord, ...] = ()
        kept = 0
        if path.is_file():
            lines, kept = _whole_lines(path)
            if lines:
                _check_header(path, lines[0], header)
                self.records = _decode_records(path, lines[1:], header)
        self._stream = path.open("r+b" if path.is_file() else "x+b")
        self._stream.truncate(kept)
        self._stream.seek(kept)
        if kept == 0:
            self._write(header)

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def append(self, record: EpisodeRecord) -> None:
        """Add one finished episode."""
        self._write(record)
        self.records = (*self.records, record)

    def _write(self, value: Header | EpisodeRecord) -> None:
        try:
            self._stream.write(msgspec.json.encode(value) + b"\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise explain(
                self.path,
                "could not be written",
                got=error,
                remedy="free space or choose another disk; then run the same command to resume",
            ) from error


def read_journal(path: Path) -> tuple[Header, tuple[EpisodeRecord, ...]]:
    """Return the header and the finished episodes of a journal. Raises `QuantVLAError` for a damaged one."""
    if not path.is_file():
        raise explain(path, "no such journal", remedy="run the evaluation first")
    lines, _ = _whole_lines(path)
    header = _decode_header(path, lines[0] if lines else b"")
    return header, _decode_records(path, lines[1:], header)


def _whole_lines(path: Path) -> tuple[Sequence[bytes], int]:
    """Return the complete lines and how many bytes they take; a tail without a line end is left out."""
    data = path.read_bytes()
    kept = data.rfind(b"\n") + 1
    return data[:kept].splitlines(), kept


def _decode_header(path: Path, line: bytes) -> Header:
    try:
        return msgspec.json.decode(line, type=Header)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise explain(path, f"is not a journal ({error})", remedy=_START_AGAIN) from error


def _check_header(path: Path, line: bytes, expected: Header) -> None:
    found = _decode_header(path, line)
    for field in Header.__struct_fields__:
        if getattr(found, field) != getattr(expected, field):
            raise explain(
                path,
                f"is the journal of another evaluation: {field} expected {getattr(expected, field)}",
                got=getattr(found, field),
                remedy=_START_AGAIN,
            )


def _decode_records(
    path: Path, lines: Sequence[bytes], header: Header
) -> tuple[EpisodeRecord, ...]:
    records: list[EpisodeRecord] = []
    for number, line in enumerate(lines, start=2):
        try:
            record = msgspec.json.decode(line, type=EpisodeRecord)
            if record.outcomes.keys() != header.arms.keys():
                raise msgspec.ValidationError(f"arms {', '.join(record.outcomes)}")
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            raise explain(
                f"{path}:{number}",
                f"damaged line ({error})",
                remedy="delete the line to run its episode again",
            ) from error
        records.append(record)
    return tuple(records)
