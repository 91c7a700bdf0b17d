"""A real server in a thread of the test, on a free port, and raw sockets to be rude to it with."""

from __future__ import annotations

import asyncio
import base64
import os
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from quantvla.runtime.manifest import read_manifest
from quantvla.runtime.policy import Policy
from quantvla.runtime.serve.access import Access
from quantvla.runtime.serve.inference import ServedPolicy
from quantvla.runtime.serve.limits import Limits
from quantvla.runtime.serve.request import RequestReader
from quantvla.runtime.serve.server import PolicyServer

KEY = "0123456789abcdef-key"


@dataclass(frozen=True)
class Served:
    """A running server."""

    port: int
    scheme: str = "ws"

    @property
    def uri(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def get(self, path: str, key: str | None = None) -> tuple[int, str]:
        """Return status and body of an HTTP request."""
        headers = {"Authorization": f"Api-Key {key}"} if key else {}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def counted(self, name: str, **labels: str) -> float:
        """Return a metric."""
        inside = ",".join(f'{key}="{value}"' for key, value in labels.items())
        wanted = f"{name}{{{inside}}} " if labels else f"{name} "
        lines = self.get("/metrics")[1].splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(wanted))


@contextmanager
def serving(
    engine: Path,
    *,
    load: Callable[[], ServedPolicy] | None = None,
    access: Access | None = None,
    limits: Limits | None = None,
    renames: Mapping[str, str] | None = None,
    warm: bool = True,
) -> Iterator[Served]:
    """Serve ``engine`` while the block runs; ``warm`` waits until it answers."""
    manifest = read_manifest(engine)
    access = access or Access(port=0)
    ports: list[int] = []
    listens, is_warm, failed = threading.Event(), threading.Event(), []
    stop: list[Callable[[], object]] = []

    def listening(port: int, warm: bool) -> None:
        ports.append(port)
        (is_warm if warm else listens).set()

    async def run() -> None:
        event = asyncio.Event()
        loop = asyncio.get_running_loop()
        stop.append(lambda: loop.call_soon_threadsafe(event.set))
        server = PolicyServer(
            manifest,
            load or (lambda: Policy.from_pretrained(engine, threads=1)),
            RequestReader(manifest, renames or {}),
            access,
            limits or Limits(),
            name="quantvla test",
        )
        await server.run(event, listening)

    def main() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:
            failed.append(error)
            listens.set()
            is_warm.set()

    thread = threading.Thread(target=main)
    thread.start()
    try:
        (is_warm if warm else listens).wait(30)
        if failed:
            thread.join(30)
            raise failed[0]
        yield Served(ports[0], "ws" if access.tls_cert is None else "wss")
    finally:
        if thread.is_alive():
            stop[0]()
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"


def raw_websocket(port: int, *headers: str) -> socket.socket:
    """Return a socket after the opening handshake and the metadata frame."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=20)
    key = base64.b64encode(os.urandom(16)).decode()
    lines = (
        "GET / HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {key}",
        "Sec-WebSocket-Version: 13",
        *headers,
    )
    sock.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += sock.recv(1)
    assert answer.startswith(b"HTTP/1.1 101"), answer
    opcode, _ = read_frame(sock)
    assert opcode == 2
    return sock


def frame_head(length: int, *, opcode: int = 2, final: bool = True) -> bytes:
    """Return the head of a masked frame whose mask is zero, so that the payload goes as it is."""
    first = bytes([(0x80 if final else 0) | opcode])
    if length < 126:
        size = bytes([0x80 | length])
    elif length < 1 << 16:
        size = b"\xfe" + length.to_bytes(2, "big")
    else:
        size = b"\xff" + length.to_bytes(8, "big")
    return first + size + bytes(4)


def read_frame(sock: socket.socket) -> tuple[int, bytes]:
    """Return opcode and payload of the next frame from the server; (-1, b"") at the end."""
    head = _exactly(sock, 2)
    if len(head) < 2:
        return -1, b""
    length = head[1] & 0x7F
    if length == 126:
        length = int.from_bytes(_exactly(sock, 2), "big")
    elif length == 127:
        length = int.from_bytes(_exactly(sock, 8), "big")
    return head[0] & 0x0F, _exactly(sock, length)


def read_close(sock: socket.socket) -> int:
    """Return the close code that the server sends, whatever comes before it; -1 if it just ends."""
    while True:
        opcode, payload = read_frame(sock)
        if opcode == 8:
            return int.from_bytes(payload[:2], "big")
        if opcode == -1:
            return -1


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        if not part:
            break
        data += part
    return data
