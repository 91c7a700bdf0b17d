"""Reading a trace: records in order, observations by their place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.control.trace import (
    TRACE_VERSION,
    ArrayPlace,
    Header,
    InferenceRecord,
    Record,
    observations_file,
)
from quantvla.runtime.errors import explain

_DECODER = msgspec.json.Decoder(Record)


def read_header(path: Path) -> Header:
    """Return the first record; raises `QuantVLAError` if ``path`` is not a trace of this version."""
    if not path.is_file():
        raise explain(path, "no such file", remedy="give the trace that `quantvla run` wrote")
    first = next(read_records(path), None)
    if not isinstance(first, Header):
        raise explain(path, "not a trace: its first line is no header", remedy="give another file")
    if first.version != TRACE_VERSION:
        raise explain(
            path,
            f"expected trace version {TRACE_VERSION}",
            got=first.version,
            remedy="record it anew",
        )
    return first


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records; an incomplete last line (a killed run, a full disk) ends them."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield _DECODER.decode(line)
            except (msgspec.ValidationError, msgspec.DecodeError) as error:
                raise explain(
                    f"{path} line {number}",
                    f"not a trace record ({error})",
                    remedy="record it anew",
                ) from error


def load_observation(path: Path, record: InferenceRecord) -> dict[str, object]:
    """Return the observation of an inference, bit for bit as the policy got it."""
    file = observations_file(path)
    if not file.is_file():
        raise explain(file, "is missing", remedy="copy it together with the trace")
    with file.open("rb") as stream:
        arrays = {key: _load(file, stream, place) for key, place in record.arrays.items()}
    return {**record.text, **arrays}


def _load(file: Path, stream: BinaryIO, place: ArrayPlace) -> NDArray[Any]:
    dtype = np.dtype(place.dtype)
    size = dtype.itemsize * int(np.prod(place.shape, dtype=np.int64))
    stream.seek(place.offset)
    data = stream.read(size)
    if len(data) != size:
        raise explain(file, "is cut short", remedy="copy it again, or replay a complete trace")
    return np.frombuffer(data, dtype=dtype).reshape(place.shape)
