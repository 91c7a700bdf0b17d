"""Everything a run did, as JSON lines; pictures and states of each inference in a file beside it."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.control.cascade import Answer
from quantvla.runtime.control.counters import LoopReport
from quantvla.runtime.control.spec import CascadeSpec, StrategySpec
from quantvla.runtime.reuse import ReuseSpec

TRACE_VERSION = 1
_QUEUE = 4096
_logger = logging.getLogger(__name__)


class _Record(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """Base of all records."""


class Header(_Record, frozen=True, kw_only=True, tag="header"):
    """First line: what ran. ``strategy`` None: one that a replay cannot build."""

    version: int = TRACE_VERSION
    engine: str
    manifest_sha256: str
    threads: int
    versions: dict[str, str]
    strategy: StrategySpec | None
    cascade: CascadeSpec | None = None
    reuse: ReuseSpec | None = None
    rate_hz: float
    joints: tuple[str, ...]
    started: str
    dry_run: bool = False


class ArrayPlace(msgspec.Struct, frozen=True):
    """Where an array of an observation lies in the file of observations."""

    offset: int
    dtype: str
    shape: tuple[int, ...]


class InferenceRecord(_Record, frozen=True, kw_only=True, tag="inference"):
    """One request and its answer: enough to run it again. ``arrived`` is the tick that took it over.

    ``answer``: the level of a cascade that made the chunk.
    """

    index: int
    tick: int
    arrived: int
    seed: int
    delay_ticks: int
    latency_ms: float
    ahead: list[list[float]]
    chunk: list[list[float]] | None
    error: str | None
    answer: Answer | None = None
    text: dict[str, str] = {}
    arrays: dict[str, ArrayPlace] = {}


class TickRecord(_Record, frozen=True, kw_only=True, tag="tick"):
    """One tick: what was planned, what was sent (null: nothing), how late, and what the guard said."""

    tick: int
    late_ms: float
    planned: list[float] | None
    sent: list[float] | None
    inference: int
    held: Literal["", "starved", "guard"] = ""
    causes: tuple[str, ...] = ()


class EventRecord(_Record, frozen=True, kw_only=True, tag="event"):
    """Something worth a line: an error, a bad observation, an intervention."""

    tick: int
    text: str


class EndRecord(_Record, frozen=True, kw_only=True, tag="end"):
    """Last line."""

    report: LoopReport


Record = Header | InferenceRecord | TickRecord | EventRecord | EndRecord


class Trace(Protocol):
    """Where records go. Calls return at once and never raise."""

    def write(self, record: Record, observation: Mapping[str, object] | None = None) -> None:
        """Take a record; ``observation`` goes with an inference."""
        ...

    def lost(self) -> int:
        """Return how many records could not be written so far."""
        ...


class NoTrace:
    """Keeps nothing."""

    def write(self, record: Record, observation: Mapping[str, object] | None = None) -> None:
        """Do nothing."""

    def lost(self) -> int:
        """Return 0."""
        return 0


class TraceWriter:
    """Writes a trace from a thread of its own, so that a slow disk does not slow the loop.

    A record that the disk refuses, or that comes while 4096 others wait, is lost and counted;
    after a refusal nothing more is written, since what follows could not be placed.
    """

    def __init__(self, path: Path, header: Header) -> None:
        """Create the trace. Raises OSError if even the header cannot be written."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._lines = path.open("wb", buffering=0)
        self._arrays = observations_file(path).open("wb", buffering=0)
        self._offset = 0
        self._lost = 0
        self._broken = False
        self._lines.write(msgspec.json.encode(header) + b"\n")
        self._queue: queue.Queue[tuple[Record, Mapping[str, object] | None] | None] = queue.Queue(
            _QUEUE
        )
        self._thread = threading.Thread(target=self._run, name="trace", daemon=True)
        self._thread.start()

    def write(self, record: Record, observation: Mapping[str, object] | None = None) -> None:
        """Hand a record to the writing thread."""
        try:
            self._queue.put_nowait((record, observation))
        except queue.Full:
            self._lost += 1

    def lost(self) -> int:
        """Return how many records were lost so far."""
        return self._lost

    def close(self) -> None:
        """Write what is waiting and close the files. Closing twice is fine."""
        if not self._thread.is_alive():
            return
        self._queue.put(None)
        self._thread.join()
        for stream in (self._lines, self._arrays):
            try:
                stream.close()
            except OSError as error:  # a network file system may refuse what it took before
                self._fail(error)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._broken:
                self._lost += 1
                continue
            try:
                self._write(*item)
            except Exception as error:  # a full disk, or an observation that cannot be stored
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Count a lost record and write nothing more."""
        self._broken = True
        self._lost += 1
        _logger.error("%s: the trace is incomplete from here on: %s", self.path, error)

    def _write(self, record: Record, observation: Mapping[str, object] | None) -> None:
        if isinstance(record, InferenceRecord) and observation is not None:
            text = {k: v for k, v in observation.items() if isinstance(v, str)}
            arrays = {
                k: self._store(v) for k, v in observation.items() if isinstance(v, np.ndarray)
            }
            record = msgspec.structs.replace(record, text=text, arrays=arrays)
        _write_all(self._lines, msgspec.json.encode(record) + b"\n")

    def _store(self, array: NDArray[Any]) -> ArrayPlace:
        place = ArrayPlace(self._offset, array.dtype.str, array.shape)
        data = np.ascontiguousarray(array).tobytes()
        _write_all(self._arrays, data)
        self._offset += len(data)
        return place


class _Stream(Protocol):
    def write(self, data: bytes, /) -> int | None: ...


def _write_all(stream: _Stream, data: bytes) -> None:
    """Write all of ``data``; an unbuffered file may take only a part, as a disk does that is almost full."""
    while data:
        written = stream.write(data)
        data = data[written or 0 :]


def observations_file(trace: Path) -> Path:
    """Return the file beside a trace that holds the observations' arrays."""
    return trace.with_suffix(trace.suffix + ".arrays")
