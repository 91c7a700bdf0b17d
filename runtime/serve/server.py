"""The websocket server: openpi's protocol, health and metrics over HTTP, and limits on everything.

Protocol (openpi, ``websocket_policy_server.py``): the server sends one metadata map; then each binary
frame from the client is an observation and each binary frame back a map with ``actions``. A text frame
back is an error in words. ``/healthz`` answers as soon as the server listens.
"""

from __future__ import annotations

import asyncio
import http
import logging
import time
from collections.abc import Callable

import msgspec
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed, ConnectionClosedOK
from websockets.frames import CloseCode
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response
from websockets.protocol import State

from quantvla.runtime.errors import QuantVLAError, explain
from quantvla.runtime.manifest import Manifest
from quantvla.runtime.serve import wire
from quantvla.runtime.serve.access import SCHEME, Access
from quantvla.runtime.serve.inference import (
    Answer,
    ClientGoneError,
    InferenceThread,
    ServedPolicy,
    Session,
    StaleRequestError,
)
from quantvla.runtime.serve.limits import Limits
from quantvla.runtime.serve.metadata import describe
from quantvla.runtime.serve.metrics import CONTENT_TYPE, Metrics
from quantvla.runtime.serve.request import RequestReader

_logger = logging.getLogger(__name__)


class PolicyServer:
    """Serves one engine to several clients.

    ``load`` makes the policy and is called once, in the thread that runs it; ``manifest`` is the
    engine's, known before. Serves while `run` runs.
    """

    def __init__(
        self,
        manifest: Manifest,
        load: Callable[[], ServedPolicy],
        reader: RequestReader,
        access: Access,
        limits: Limits,
        *,
        name: str,
    ) -> None:
        self._access = access
        self._limits = limits
        self._reader = reader
        self._metrics = Metrics()
        self._inference = InferenceThread(load, max_wait_s=limits.max_wait_s)
        self._metadata = wire.encode(
            msgspec.to_builtins(
                describe(manifest, server=name, max_message_bytes=limits.max_message_bytes)
            )
        )
        self._warm = asyncio.Event()
        self._draining = False
        self._clients: dict[ServerConnection, asyncio.Task[None] | None] = {}
        self._under_way = 0

    async def run(self, stop: asyncio.Event, listening: Callable[[int, bool], None]) -> None:
        """Serve until ``stop`` is set, then answer what is under way and close.

        ``listening(port, warm)`` is called when the port is open and again when the engine is warm.
        Raises `QuantVLAError` when the port is taken or the engine cannot be loaded.
        """
        server = await self._listen()
        port = next(iter(server.sockets)).getsockname()[1]
        listening(port, False)
        stopped = asyncio.ensure_future(stop.wait())
        loading = asyncio.ensure_future(self._inference.start())
        try:
            await asyncio.wait((stopped, loading), return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                loading.result()
                self._warm.set()
                self._metrics.warm.set(1)
                listening(port, True)
                await stopped
        finally:
            for task in (stopped, loading):
                task.cancel()
            await self._drain()
            server.close()
            await server.wait_closed()
            await asyncio.to_thread(self._inference.stop, self._limits.grace_s)

    async def _listen(self) -> Server:
        limits, access = self._limits, self._access
        try:
            return await serve(
                self._handle,
                access.host,
                access.port,
                ssl=access.ssl_context(),
                process_request=self._http,
                # Browsers send an Origin: no web page may reach a robot's server on this machine.
                origins=[None],
                compression=None,
                open_timeout=limits.receive_s,
                ping_interval=limits.receive_s,
                ping_timeout=limits.receive_s,
                close_timeout=2.0,
                max_size=limits.max_message_bytes,
                max_queue=1,
                logger=_logger.getChild("websockets"),
            )
        except OSError as error:
            raise explain(
                f"{access.host}:{access.port}",
                "cannot be listened on",
                got=error,
                remedy="choose another port",
            ) from error

    async def _drain(self) -> None:
        """Refuse new clients, wait for the answers under way, then end what did not come in time."""
        self._draining = True
        deadline = time.monotonic() + self._limits.grace_s
        while self._under_way and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        for task in self._clients.values():
            if task is not None and (self._under_way or not self._warm.is_set()):
                task.cancel()

    def _http(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        """Answer health and metrics, turn away who may not come in, return None for a websocket."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if path == "/health":
            status, text = self._health()
            return connection.respond(status, text)
        if not self._access.allows(request.headers.get("Authorization")):
            self._metrics.refused.labels("key").inc()
            response = connection.respond(
                http.HTTPStatus.UNAUTHORIZED, f"send the header Authorization: {SCHEME} KEY\n"
            )
            response.headers["WWW-Authenticate"] = SCHEME
            return response
        if path == "/metrics":
            return self._metrics_response(connection)
        if self._draining or len(self._clients) >= self._limits.max_clients:
            reason = "stopping" if self._draining else "clients"
            self._metrics.refused.labels(reason).inc()
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, f"refused: {reason}\n")
        self._clients[connection] = None
        connection.loop.create_task(self._forget_when_closed(connection))
        return None

    async def _forget_when_closed(self, connection: ServerConnection) -> None:
        await connection.wait_closed()
        self._clients.pop(connection, None)

    def _health(self) -> tuple[http.HTTPStatus, str]:
        if self._draining:
            return http.HTTPStatus.SERVICE_UNAVAILABLE, "stopping\n"
        if not self._warm.is_set():
            return http.HTTPStatus.SERVICE_UNAVAILABLE, "loading\n"
        if self._inference.running_s() > self._limits.stall_s:
            return http.HTTPStatus.SERVICE_UNAVAILABLE, "stalled\n"
        return http.HTTPStatus.OK, "ready\n"

    def _metrics_response(self, connection: ServerConnection) -> Response:
        self._metrics.clients.set(len(self._clients))
        self._metrics.waiting.set(self._under_way)
        response = connection.respond(http.HTTPStatus.OK, self._metrics.text().decode())
        del response.headers["Content-Type"]
        response.headers["Content-Type"] = CONTENT_TYPE
        return response

    async def _handle(self, connection: ServerConnection) -> None:
        """Serve one client until it leaves; nothing that it sends ends the server."""
        self._clients[connection] = asyncio.current_task()
        try:
            await self._warm.wait()
            await connection.send(self._metadata)
            await self._converse(connection)
            if self._draining:
                await connection.close(CloseCode.GOING_AWAY, "server is stopping")
        except ConnectionClosed as closed:
            expected = isinstance(closed, ConnectionClosedOK)
            level = logging.INFO if expected else logging.WARNING
            _logger.log(level, "%s left: %s", _name(connection), closed)
        except asyncio.CancelledError:
            await connection.close(CloseCode.GOING_AWAY, "server is stopping")

    async def _converse(self, connection: ServerConnection) -> None:
        """Answer one message after the other; a client that sends no messages of ours is closed."""
        session, previous_s = Session(), None
        while not self._draining:
            data = await self._receive(connection)
            if data is None:
                return
            started = time.monotonic()
            try:
                message = wire.decode(data)
            except QuantVLAError as error:
                await connection.send(self._refuse("malformed", str(error)))
                await _turn_out(connection, CloseCode.INVALID_DATA, "malformed message")
                return
            self._under_way += 1
            try:
                await connection.send(await self._reply(connection, session, message, previous_s))
            finally:
                self._under_way -= 1
            previous_s = time.monotonic() - started

    async def _receive(self, connection: ServerConnection) -> bytes | None:
        """Return the next binary message; None after closing a client that sends another or is slow."""
        stream = connection.recv_streaming()
        first = await stream.__anext__()
        if isinstance(first, str):
            await _turn_out(connection, CloseCode.UNSUPPORTED_DATA, "send binary msgpack frames")
            return None

        async def rest() -> bytes:
            return b"".join([first, *[part async for part in stream]])  # type: ignore[list-item]

        try:
            data = await asyncio.wait_for(rest(), self._limits.receive_s)
        except asyncio.TimeoutError:
            await _turn_out(connection, CloseCode.POLICY_VIOLATION, "message came too slowly")
            return None
        self._metrics.received_bytes.inc(len(data))
        return data

    async def _reply(
        self,
        connection: ServerConnection,
        session: Session,
        message: wire.Message,
        previous_s: float | None,
    ) -> bytes | str:
        """Return the binary answer to one message, or the text that says why there is none."""
        try:
            answer = await self._inference.predict(
                lambda: self._reader.read(message),
                session,
                lambda: connection.state is State.OPEN,
            )
        except ClientGoneError as error:
            return self._refuse("lost", str(error))
        except StaleRequestError as error:
            return self._refuse("stale", str(error))
        except QuantVLAError as error:
            return self._refuse("bad_request", str(error))
        except Exception as error:  # an engine that fails once may work for the next request
            _logger.exception("the engine failed")
            return self._refuse("failed", f"the engine failed: {type(error).__name__}: {error}")
        self._metrics.requests.labels("ok").inc()
        self._metrics.infer.observe(answer.infer_s)
        self._metrics.queue.observe(answer.queue_s)
        return wire.encode(
            {"actions": answer.actions, "server_timing": _timing(answer, previous_s)}
        )

    def _refuse(self, outcome: str, text: str) -> str:
        self._metrics.requests.labels(outcome).inc()
        return text


async def _turn_out(connection: ServerConnection, code: CloseCode, reason: str) -> None:
    """Close on a client that does not keep to the protocol, and say so in the log."""
    _logger.warning("%s is turned out: %s", _name(connection), reason)
    await connection.close(code, reason)


def _name(connection: ServerConnection) -> str:
    return f"client {connection.remote_address}"


def _timing(answer: Answer, previous_s: float | None) -> dict[str, float]:
    """Return openpi's ``server_timing`` in milliseconds, with the wait and the decoding beside it."""
    timing = {
        "infer_ms": answer.infer_s * 1e3,
        "queue_ms": answer.queue_s * 1e3,
        "decode_ms": answer.decode_s * 1e3,
    }
    if previous_s is not None:
        timing["prev_total_ms"] = previous_s * 1e3
    return timing
