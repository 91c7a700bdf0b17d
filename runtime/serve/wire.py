"""Messages on the wire: msgpack maps whose arrays are written the way openpi writes them.

An array is a map with the byte-string keys ``__ndarray__``, ``data``, ``dtype`` and ``shape``; a numpy
scalar one with ``__npgeneric__``, ``data`` and ``dtype`` (openpi-client, ``msgpack_numpy.py``). Nothing
here can run code: no pickle, no object dtypes, no extension types, and every size is checked before
anything of that size is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.errors import QuantVLAError, explain

MAX_KEYS = 64
MAX_TEXT = 1 << 14
MAX_NUMBERS = 1 << 12
MAX_AXES = 6
_ARRAY, _SCALAR = b"__ndarray__", b"__npgeneric__"
_KINDS = ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_DTYPES = {
    dtype.str: dtype for order in "<>" for dtype in (np.dtype(order + kind) for kind in _KINDS)
}

# What a value is stands in its first byte, and a map's keys are text or, in an array's map, byte
# strings. Nothing is decoded as a map or list of anything: 16 MB could become gigabytes that way.
_SIZE = msgspec.Meta(max_length=MAX_KEYS)
_TEXT_KEYS = msgspec.msgpack.Decoder(Annotated[dict[str, msgspec.Raw], _SIZE])
_BYTES_KEYS = msgspec.msgpack.Decoder(Annotated[dict[bytes, msgspec.Raw], _SIZE])
_NUMBERS = msgspec.msgpack.Decoder(Annotated[list[float], msgspec.Meta(max_length=MAX_NUMBERS)])
_PLAIN = msgspec.msgpack.Decoder(Any)
_MAP_HEADS = {**dict.fromkeys(range(0x80, 0x90), 1), 0xDE: 3, 0xDF: 5}
_BYTE_STRING_BYTES = frozenset((0xC4, 0xC5, 0xC6))
_LIST_BYTES = frozenset((*range(0x90, 0xA0), 0xDC, 0xDD))
_EXTENSION_BYTES = frozenset((0xC7, 0xC8, 0xC9, *range(0xD4, 0xD9)))
_DTYPE = msgspec.msgpack.Decoder(Annotated[str, msgspec.Meta(max_length=4)])
_DATA = msgspec.msgpack.Decoder(bytes)
_SHAPE = msgspec.msgpack.Decoder(
    Annotated[
        list[Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]], msgspec.Meta(max_length=MAX_AXES)
    ]
)
_NUMBER: msgspec.msgpack.Decoder[bool | int | float] = msgspec.msgpack.Decoder(bool | int | float)

Message = dict[str, Any]


def encode(message: Mapping[str, object]) -> bytes:
    """Return the msgpack bytes of ``message``; raises `QuantVLAError` for a value that has no form there."""
    try:
        return _ENCODER.encode(message)
    except (TypeError, ValueError, OverflowError) as error:
        raise explain(
            "message",
            f"cannot be sent ({error})",
            remedy="send text, numbers, byte strings and numeric arrays",
        ) from error


def decode(data: bytes) -> Message:
    """Return the message in ``data``, one level of maps in it allowed; arrays are read-only views of it.

    Raises `QuantVLAError` for anything else, whatever the bytes are.
    """
    try:
        top = _TEXT_KEYS.decode(data)
        return {key: _value(raw, nested=True) for key, raw in top.items()}
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise _malformed(str(error)) from error


def _to_wire(value: object) -> object:
    """Return what msgpack can write for a numpy array or scalar."""
    if isinstance(value, np.ndarray):
        return {
            _ARRAY: True,
            b"data": np.ascontiguousarray(value).data.cast("B") if value.size else b"",
            b"dtype": _name(value.dtype),
            b"shape": value.shape,
        }
    if isinstance(value, np.generic):
        return {_SCALAR: True, b"data": value.item(), b"dtype": _name(value.dtype)}
    raise TypeError(f"a {type(value).__module__}.{type(value).__name__}")


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_to_wire)


def _name(dtype: np.dtype[Any]) -> str:
    if dtype.str not in _DTYPES:
        raise TypeError(f"an array of {dtype}")
    return dtype.str


def _value(raw: msgspec.Raw, *, nested: bool) -> Any:
    first = memoryview(raw)[0]
    if first in _MAP_HEADS:
        return _map(raw, _MAP_HEADS[first], nested=nested)
    if first in _LIST_BYTES:
        return _NUMBERS.decode(raw)
    if first in _EXTENSION_BYTES:
        raise _malformed("it holds a msgpack extension type")
    value = _PLAIN.decode(raw)
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise _malformed(f"a text of {len(value)} characters, at most {MAX_TEXT} are taken")
    return value


def _map(raw: msgspec.Raw, head: int, *, nested: bool) -> Any:
    """Return the array, the scalar or the plain map in ``raw``, whose keys start after ``head`` bytes."""
    if memoryview(raw)[head : head + 1] and memoryview(raw)[head] in _BYTE_STRING_BYTES:
        fields = _BYTES_KEYS.decode(raw)
        return _array(fields) if _ARRAY in fields else _scalar(fields)
    if not nested:
        raise _malformed("maps are nested more than one level deep")
    return {key: _value(inner, nested=False) for key, inner in _TEXT_KEYS.decode(raw).items()}


def _scalar(fields: dict[bytes, msgspec.Raw]) -> Any:
    _field(fields, _SCALAR)
    dtype, number = _dtype(fields), _NUMBER.decode(_field(fields, b"data"))
    try:
        with np.errstate(over="raise"):
            return dtype.type(number)
    except (ValueError, OverflowError, FloatingPointError) as error:
        raise _malformed(f"{number} is no {dtype}") from error


def _array(fields: dict[bytes, msgspec.Raw]) -> NDArray[Any]:
    dtype = _dtype(fields)
    data = _DATA.decode(_field(fields, b"data"))
    shape = _SHAPE.decode(_field(fields, b"shape"))
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise _malformed(
            f"an array {dtype.str} of shape {shape} takes {expected} bytes, got {len(data)}"
        )
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def _dtype(fields: dict[bytes, msgspec.Raw]) -> np.dtype[Any]:
    name = _DTYPE.decode(_field(fields, b"dtype"))
    if name not in _DTYPES:
        raise _malformed(f"unknown dtype {name!r}, expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _field(fields: dict[bytes, msgspec.Raw], name: bytes) -> msgspec.Raw:
    if name not in fields:
        raise _malformed(f"a map with byte-string keys but without {name.decode()!r}")
    return fields[name]


def _malformed(reason: str) -> QuantVLAError:
    return explain(
        "message",
        f"not a msgpack map of numeric arrays, numbers and text ({reason})",
        remedy="send what openpi-client's msgpack_numpy or quantvla's PolicyClient writes",
    )
