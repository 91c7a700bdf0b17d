"""Frames that no client of ours would send: each ends that connection, none the server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from served import Served, frame_head, raw_websocket, read_close, read_frame, serving
from tiny_engine import ACTION_DIM, HORIZON, observation

from quantvla.runtime.serve import wire
from quantvla.runtime.serve.client import PolicyClient
from quantvla.runtime.serve.limits import Limits

LIMIT = 1 << 16
GOOD = wire.encode({**observation(), "seed": 0})


@pytest.fixture(scope="module")
def served(pristine_engine: Path) -> Iterator[Served]:
    with serving(pristine_engine, limits=Limits(max_message_bytes=LIMIT, receive_s=1.5)) as running:
        yield running


@pytest.fixture(autouse=True)
def still_serving(served: Served) -> Iterator[None]:
    yield
    with PolicyClient(served.uri) as client:
        assert client.predict_action_chunk(observation()).shape == (HORIZON, ACTION_DIM)


def test_a_good_frame_by_hand(served: Served) -> None:
    with raw_websocket(served.port) as sock:
        sock.sendall(frame_head(len(GOOD)) + GOOD)
        opcode, payload = read_frame(sock)
        assert opcode == 2 and wire.decode(payload)["actions"].shape == (HORIZON, ACTION_DIM)


def test_fragments_are_put_together(served: Served) -> None:
    with raw_websocket(served.port) as sock:
        sock.sendall(frame_head(100, final=False) + GOOD[:100])
        sock.sendall(frame_head(len(GOOD) - 100, opcode=0) + GOOD[100:])
        assert read_frame(sock)[0] == 2


@pytest.mark.parametrize("payload", [b"", b"nonsense", GOOD[:-1], GOOD + b"\0"])
def test_malformed_message(served: Served, payload: bytes) -> None:
    with raw_websocket(served.port) as sock:
        sock.sendall(frame_head(len(payload)) + payload)
        opcode, words = read_frame(sock)
        assert opcode == 1 and b"not a msgpack map" in words
        assert read_close(sock) == 1007


def test_a_hundred_random_messages(served: Served) -> None:
    rng = np.random.default_rng(2)
    for _ in range(100):
        with raw_websocket(served.port) as sock:
            payload = rng.bytes(int(rng.integers(1, 200)))
            sock.sendall(frame_head(len(payload)) + payload)
            assert read_frame(sock)[0] == 1


def test_text_frame(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with raw_websocket(served.port) as sock:
        sock.sendall(frame_head(4, opcode=1) + b"{  }")
        assert read_close(sock) == 1003
    assert "is turned out: send binary msgpack frames" in caplog.text


@pytest.mark.parametrize("length", [LIMIT + 1, 1 << 40])
def test_oversized_frame_is_refused_by_its_head(served: Served, length: int) -> None:
    with raw_websocket(served.port) as sock:
        sock.sendall(frame_head(length))
        assert read_close(sock) == 1009


def test_oversized_in_fragments(served: Served) -> None:
    with raw_websocket(served.port) as sock:
        half = bytes(LIMIT // 2 + 1)
        sock.sendall(frame_head(len(half), final=False) + half)
        sock.sendall(frame_head(len(half), opcode=0) + half)
        assert read_close(sock) == 1009


def test_truncated_frame(served: Served) -> None:
    before = served.counted("quantvla_received_bytes_total")
    with raw_websocket(served.port) as sock:
        sock.sendall(frame_head(len(GOOD)) + GOOD[: len(GOOD) // 2])
    assert served.counted("quantvla_received_bytes_total") == before


def test_fragments_that_come_too_slowly(served: Served) -> None:
    with raw_websocket(served.port) as sock:
        sock.sendall(frame_head(10, final=False) + GOOD[:10])
        started = time.monotonic()
        assert read_close(sock) == 1008
        assert time.monotonic() - started < 8


def test_one_frame_that_comes_too_slowly(served: Served) -> None:
    """Pings go unanswered while a frame is under way, so the keepalive ends it."""
    with raw_websocket(served.port) as sock:
        sock.sendall(frame_head(len(GOOD)))
        started = time.monotonic()
        sock.settimeout(0.05)
        ended = False
        for position in range(len(GOOD)):
            try:
                sock.sendall(GOOD[position : position + 1])
                if sock.recv(64) == b"":
                    ended = True
            except TimeoutError:
                continue
            except OSError:
                ended = True
            if ended or time.monotonic() - started > 10:
                break
        assert ended


def test_unmasked_frame(served: Served) -> None:
    with raw_websocket(served.port) as sock:
        sock.sendall(b"\x82\x01x")
        assert read_close(sock) == 1002


def test_a_request_that_is_no_websocket(served: Served) -> None:
    assert served.get("/")[0] == 426
    assert served.get("/no/such/page")[0] == 426
