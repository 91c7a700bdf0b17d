"""A trace run again on its engine: the same observations, noise and prefixes must give the same bits."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np

from quantvla.runtime.control.cascade import Cascade
from quantvla.runtime.control.spec import build_strategy, opened_cascade
from quantvla.runtime.control.strategy import Request, Strategy
from quantvla.runtime.control.trace import EndRecord, InferenceRecord
from quantvla.runtime.control.trace_reader import load_observation, read_header, read_records
from quantvla.runtime.control.worker import infer
from quantvla.runtime.errors import explain
from quantvla.runtime.files import sha256_file
from quantvla.runtime.manifest import MANIFEST_FILE
from quantvla.runtime.policy import Policy


class ReplayedInference(msgspec.Struct, frozen=True, kw_only=True):
    """One inference again: ``max_abs`` difference of the actions, physical units; None unless both gave a chunk.

    ``error``: why there is no chunk now.
    """

    index: int
    tick: int
    identical: bool
    max_abs: float | None
    error: str | None


class ReplayReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a replay found. ``same_engine``: the manifest is the recorded one, bit for bit.

    ``complete``: the trace goes to the end of its run.
    """

    trace: str
    engine: str
    same_engine: bool
    same_versions: bool
    complete: bool
    tolerance: float
    inferences: tuple[ReplayedInference, ...]

    @property
    def identical(self) -> int:
        """How many inferences gave the recorded bits."""
        return sum(one.identical for one in self.inferences)

    @property
    def passed(self) -> bool:
        """Whether every inference is identical, or within the tolerance if one was given."""
        return all(
            one.identical or (one.max_abs is not None and one.max_abs <= self.tolerance)
            for one in self.inferences
        )


def replay(
    path: Path, *, engine: Path | None = None, threads: int | None = None, tolerance: float = 0.0
) -> ReplayReport:
    """Return how the inferences of a trace differ when they are run again.

    ``engine`` and ``threads`` default to the recorded ones; another engine shows what it would
    have done. Raises `QuantVLAError` for a trace without inferences or with a strategy that is not data.
    """
    header = read_header(path)
    if header.strategy is None:
        raise explain(
            path, "was recorded with a strategy of its own", remedy="replay it with that program"
        )
    directory = Path(header.engine) if engine is None else engine
    with ExitStack() as stack:
        policy = stack.enter_context(
            Policy.from_pretrained(directory, threads=threads or header.threads, reuse=header.reuse)
        )
        cascade = None
        if header.cascade is not None:
            cascade = stack.enter_context(opened_cascade(header.cascade, header.strategy, policy))
        strategy = build_strategy(header.strategy, policy, cascade)
        found, complete = _replayed(path, strategy, cascade, policy.manifest.action.dim)
        versions = policy.versions
    if not found:
        raise explain(path, "holds no inference", remedy="record a longer run")
    return ReplayReport(
        trace=str(path),
        engine=str(directory),
        same_engine=sha256_file(directory / MANIFEST_FILE) == header.manifest_sha256,
        same_versions=versions == header.versions,
        complete=complete,
        tolerance=tolerance,
        inferences=found,
    )


def _replayed(
    path: Path, strategy: Strategy, cascade: Cascade | None, dim: int
) -> tuple[tuple[ReplayedInference, ...], bool]:
    """Return every inference again, and whether the trace has its last record."""
    found, complete = [], False
    for record in read_records(path):
        if isinstance(record, InferenceRecord):
            if cascade is not None:  # the one thing that a clock decided
                cascade.had_time = record.answer != "no time"
            found.append(_again(record, strategy, load_observation(path, record), dim))
        complete = isinstance(record, EndRecord)
    return tuple(found), complete


def _again(
    record: InferenceRecord, strategy: Strategy, observation: dict[str, object], dim: int
) -> ReplayedInference:
    request = Request(
        index=record.index,
        observation=observation,
        tick=record.tick,
        ahead=np.array(record.ahead, np.float32).reshape(-1, dim),
        delay_ticks=record.delay_ticks,
        seed=record.seed,
    )
    chunk, error = infer(strategy.predict, request)
    recorded = None if record.chunk is None else np.array(record.chunk, np.float32)
    same = chunk is None and recorded is None
    difference = None
    if chunk is not None and recorded is not None and chunk.shape == recorded.shape:
        same = bool(np.array_equal(chunk, recorded))
        difference = float(np.abs(chunk - recorded).max())
    return ReplayedInference(
        index=record.index,
        tick=record.tick,
        identical=same,
        max_abs=difference,
        error=None if error is None else str(error),
    )
