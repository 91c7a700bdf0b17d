"""A trace as a recording for the Rerun viewer: pictures, planned and sent actions, guard and lateness over time."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from quantvla.runtime.control.trace import EventRecord, InferenceRecord, TickRecord
from quantvla.runtime.control.trace_reader import load_observation, read_header, read_records
from quantvla.runtime.errors import explain


def require_rerun() -> Any:
    """Return the Rerun SDK; raises `QuantVLAError` where it is not installed."""
    try:
        return importlib.import_module("rerun")
    except ImportError as error:
        raise explain(
            "rerun", "is not installed", got=error, remedy="pip install 'quantvla[rerun]'"
        ) from error


def write_rerun(trace: Path, output: Path) -> None:
    """Write a trace as ``output`` (.rrd).

    Timelines `tick` and `time` (seconds from the first tick at the run's rate). Entities: one per camera, `state`,
    `planned/JOINT` and `sent/JOINT` in physical units, `latency_ms`, `late_ms`, `log`.
    """
    rr = require_rerun()
    header = read_header(trace)
    output.parent.mkdir(parents=True, exist_ok=True)
    recording = rr.RecordingStream("quantvla")
    recording.save(output)

    def at(tick: int) -> None:
        recording.set_time("tick", sequence=tick)
        recording.set_time("time", duration=tick / header.rate_hz)

    for record in read_records(trace):
        if isinstance(record, TickRecord):
            at(record.tick)
            recording.log("late_ms", rr.Scalars(record.late_ms))
            for entity, action in (("planned", record.planned), ("sent", record.sent)):
                for joint, value in zip(header.joints, action, strict=True) if action else ():
                    recording.log(f"{entity}/{joint}", rr.Scalars(value))
        elif isinstance(record, InferenceRecord):
            at(
                max(record.tick - 1, 0)
            )  # the observation is of the tick before the chunk's first row
            recording.log("latency_ms", rr.Scalars(record.latency_ms))
            for key, array in load_observation(trace, record).items():
                if isinstance(array, np.ndarray):
                    recording.log(key, rr.Image(array) if array.ndim == 3 else rr.Scalars(array))
        elif isinstance(record, EventRecord):
            at(max(record.tick, 0))
            recording.log("log", rr.TextLog(record.text))
    recording.flush()
    recording.disconnect()
