"""The wire format: readable by openpi's own module both ways, and safe for any bytes."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest
from openpi_client import msgpack_numpy

from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.serve import wire

MESSAGE = {
    "observation/image": np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
    "state": np.array([0.5, -1.0]),
    "empty": np.zeros((0, 3), np.float32),
    "view": np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1)[::2],
    "zero_dim": np.array(3, np.int64),
    "number": np.float32(3),
    "prompt": "pick up the cup",
    "jpeg": b"\xff\xd8",
    "list": [1.0, 2.5],
    "flag": True,
    "none": None,
    "images": {"left": np.ones((1, 2), bool)},
}


def assert_same(one: object, other: object) -> None:
    if isinstance(one, dict):
        assert isinstance(other, dict) and one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, np.ndarray | np.generic):
        assert isinstance(other, np.ndarray | np.generic) and one.dtype == other.dtype
        np.testing.assert_array_equal(one, other, strict=True)
    else:
        assert one == other


def test_reads_what_openpi_writes() -> None:
    assert_same(wire.decode(msgpack_numpy.packb(MESSAGE)), MESSAGE)


def test_openpi_reads_what_it_writes() -> None:
    assert_same(msgpack_numpy.unpackb(wire.encode(MESSAGE)), MESSAGE)


def test_other_byte_orders_keep_their_values() -> None:
    assert_same(wire.decode(wire.encode({"x": np.arange(3, dtype=">f4")})), {"x": np.arange(3, dtype=">f4")})  # fmt: skip


def array(**changes: object) -> bytes:
    fields = {"__ndarray__": True, "data": bytes(6), "dtype": "|u1", "shape": [2, 3]} | changes
    kept = {key.encode(): value for key, value in fields.items() if value != "left out"}
    return msgpack.packb({"x": kept})


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "truncated"),
        (b"\x93\x01\x02\x03", "Expected `object`"),
        (msgpack.packb({1: 2}), "Expected `str`"),
        (msgpack.packb({"a": 1})[:-1], "truncated"),
        (msgpack.packb({"a": 1}) + b"\x00", "trailing"),
        (msgpack.packb({str(key): 0 for key in range(65)}), "length <= 64"),
        (msgpack.packb({"a": {"b": {"c": 1}}}), "nested more than one"),
        (msgpack.packb({"a": [0.0] * 5000}), "length <= 4096"),
        (msgpack.packb({"a": ["text"]}), "Expected `float`"),
        (msgpack.packb({"a": "x" * 20000}), "20000 characters"),
        (msgpack.packb({"a": msgpack.ExtType(5, b"x")}), "extension type"),
        (msgpack.packb({"a": msgpack.Timestamp(1)}), "extension type"),
        (b"\x81\xa1a" + b"\x91" * 100_000, "recursion|truncated"),
        (b"\x81\xa1a" + b"\x81\xa1b" * 100_000, "recursion|truncated|nested"),
        (b"\x81\xdd\x00\x0f\x00\x00" + b"\x90" * 983_040 + b"\x01", "Expected `str`"),
        (b"\x81\xa1a\xdd\xff\xff\xff\xff", "truncated"),
        (b"\x81\xa1a\xc6\xff\xff\xff\xff", "truncated"),
        (array(dtype="|O"), r"unknown dtype '\|O'"),
        (array(dtype="<c8"), "unknown dtype"),
        (array(dtype="|V6"), "unknown dtype"),
        (array(dtype="f4,f4"), "length <= 4"),
        (array(dtype=None), "Expected `str`"),
        (array(shape=[2, 4]), "takes 8 bytes, got 6"),
        (array(shape=[-2, -3]), ">= 0"),
        (array(shape=[1 << 31, 0]), "< 2147483648|<= 2147483647"),
        (array(shape=[1] * 7), "length <= 6"),
        (array(shape=[2.0, 3]), "Expected `int`"),
        (array(shape="left out"), "without 'shape'"),
        (array(data="left out"), "without 'data'"),
        (array(data="text"), "Expected `bytes`"),
        (msgpack.packb({"x": {b"dtype": "|u1", b"data": 3}}), "without '__npgeneric__'"),
        (msgpack.packb({"x": {b"__npgeneric__": True, b"dtype": "|u1", b"data": 300}}), "300 is no"),
        (msgpack.packb({"x": {b"__npgeneric__": True, b"dtype": "<f4", b"data": 1e300}}), "is no"),
        (msgpack.packb({"x": {b"__npgeneric__": True, b"dtype": "<i8", b"data": float("nan")}}), "is no"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_malformed_bytes_are_named(data: bytes, match: str) -> None:
    with pytest.raises(QuantVLAError, match=match):
        wire.decode(data)


def test_a_thousand_random_strings_never_raise_anything_else() -> None:
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(1000):
        try:
            wire.decode(rng.bytes(int(rng.integers(0, 300))))
        except QuantVLAError:
            refused += 1
    assert refused > 990


def test_a_thousand_damaged_messages_never_raise_anything_else() -> None:
    rng = np.random.default_rng(1)
    good = wire.encode(MESSAGE)
    refused = 0
    for _ in range(1000):
        data = bytearray(good)
        for _ in range(int(rng.integers(1, 4))):
            data[rng.integers(len(data))] = rng.integers(256)
        try:
            for value in wire.decode(bytes(data)).values():
                assert not (isinstance(value, np.ndarray) and value.dtype.hasobject)
        except QuantVLAError:
            refused += 1
    assert 200 < refused < 1000


@pytest.mark.parametrize("value", [np.array([object()]), np.array(["text"]), 1j, np.complex64(1)])
def test_values_without_a_form_are_refused(value: object) -> None:
    with pytest.raises(QuantVLAError, match="cannot be sent"):
        wire.encode({"x": value})
