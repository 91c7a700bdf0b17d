"""An engine on another machine, used like a `Policy`; it reconnects when the server comes back."""

from __future__ import annotations

import io
import ssl
import time
from dataclasses import asdict
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from quantvla.runtime.errors import QuantVLAError, explain
from quantvla.runtime.guidance import ActionPrefix
from quantvla.runtime.preprocess import Observation
from quantvla.runtime.sampler import standard_noise
from quantvla.runtime.serve import wire
from quantvla.runtime.serve.access import SCHEME
from quantvla.runtime.serve.metadata import PROTOCOL, ServerMetadata
from quantvla.runtime.stepping import SteppedPolicy

FloatArray = NDArray[np.float32]

_RETRY_S = 0.2


class PolicyClient(SteppedPolicy):
    """Asks a `quantvla serve` for action chunks. One object serves one robot and one thread.

    The observation is that of `Policy`. The noise is drawn here, from ``seed``, and sent along, so
    the server keeps nothing of an episode: a request that is sent again after a lost connection
    gives the same actions, and the actions are those of a local `Policy` with the same noise.

    uri: ``ws://host:port`` or ``wss://host:port``; ``connect_s``: how long to wait for the server at
    first; ``timeout_s``: for one chunk, reconnecting and sending it again included. After that a
    robot should hold: `QuantVLAError` is raised. ``jpeg_quality`` (1 to 95) sends images as JPEG,
    which is smaller and changes pixels a little.
    """

    def __init__(
        self,
        uri: str = "ws://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        ssl_context: ssl.SSLContext | None = None,
        seed: int = 0,
        connect_s: float = 60.0,
        timeout_s: float = 5.0,
        jpeg_quality: int | None = None,
    ) -> None:
        super().__init__(seed)
        self.uri = uri
        self._headers = {"Authorization": f"{SCHEME} {api_key}"} if api_key else None
        self._ssl_context = ssl_context
        self._timeout_s = timeout_s
        self._jpeg_quality = jpeg_quality
        self._connection: ClientConnection | None = None
        self._metadata: ServerMetadata | None = None
        self.timing: dict[str, float] = {}
        self.reconnects = -1
        self._reach(time.monotonic() + connect_s)

    @property
    def metadata(self) -> ServerMetadata:
        """What the server said about its engine."""
        assert self._metadata is not None
        return self._metadata

    @property
    def execute(self) -> int:
        """How many actions of a chunk `select_action` gives out."""
        return self.metadata.action.execute

    def predict_action_chunk(
        self,
        obs: Observation,
        *,
        noise: NDArray[Any] | None = None,
        seed: int | None = None,
        prefix: ActionPrefix | None = None,
    ) -> FloatArray:
        """Return the next (horizon, dim) float32 actions in physical units.

        With ``prefix`` the chunk continues the actions given there (real-time chunking).
        Raises `QuantVLAError` with the server's words when it refuses the observation, and when no
        answer came in time. ``timing`` then holds the server's milliseconds for the last chunk.
        """
        message: dict[str, object] = {key: self._sent(value) for key, value in obs.items()}
        if seed is not None:
            message["seed"] = seed
        if noise is None and seed is None:
            noise = standard_noise(self._generator, self.metadata.noise_shape)
        if noise is not None:
            message["noise"] = noise
        if prefix is not None:
            message["prefix"] = asdict(prefix)
        reply = self._exchange(wire.encode(message))
        self.timing = dict(reply.get("server_timing", {}))
        return self._checked(reply.get("actions"))

    def close(self) -> None:
        """End the connection; the next request would open another. Closing twice is fine."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _sent(self, value: object) -> object:
        if self._jpeg_quality is None or not isinstance(value, np.ndarray):
            return value
        if value.ndim != 3 or value.dtype != np.uint8:
            return value
        stream = io.BytesIO()
        Image.fromarray(value).save(stream, "JPEG", quality=self._jpeg_quality)
        return stream.getvalue()

    def _exchange(self, data: bytes) -> wire.Message:
        """Return the reply to ``data``, sent again on a new connection when the old one is lost."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            connection = self._reach(deadline)
            try:
                connection.send(data)
                reply = connection.recv(timeout=max(deadline - time.monotonic(), 0.001))
            except (ConnectionClosed, OSError, TimeoutError) as error:
                self.close()  # a late answer to this request must not be taken for the next one's
                if isinstance(error, TimeoutError):
                    raise self._unreachable(error) from error
                if _is_final(error):
                    raise explain(self.uri, "the server ended the connection", got=error,
                                  remedy="see its log") from error  # fmt: skip
                continue
            if isinstance(reply, str):
                raise QuantVLAError(f"{self.uri}: {reply}")
            return wire.decode(reply)

    def _reach(self, deadline: float) -> ClientConnection:
        """Return the open connection, or try for one until ``deadline`` (time.monotonic)."""
        refusal: InvalidStatus | None = None
        while self._connection is None:
            left = deadline - time.monotonic()
            try:
                self._connection = self._connect(max(left, 0.001))
                self.reconnects += 1
            except InvalidStatus as error:
                refusal = error
                if error.response.status_code != 503 or left <= _RETRY_S:
                    raise self._refused(error) from error
                time.sleep(_RETRY_S)
            except ssl.SSLCertVerificationError as error:
                raise explain(
                    self.uri,
                    "the server's certificate is not trusted",
                    got=error.verify_message,
                    remedy="pass an ssl_context that trusts it",
                ) from error
            except (ConnectionClosed, OSError, TimeoutError, InvalidHandshake) as error:
                if left <= _RETRY_S:
                    why = self._unreachable(error) if refusal is None else self._refused(refusal)
                    raise why from error
                time.sleep(_RETRY_S)
        return self._connection

    def _connect(self, timeout_s: float) -> ClientConnection:
        """Return a new connection whose metadata frame was read and fits the one before."""
        connection = connect(
            self.uri,
            additional_headers=self._headers,
            ssl=self._ssl_context,
            compression=None,
            max_size=None,
            open_timeout=timeout_s,
            close_timeout=1.0,
        )
        try:
            metadata = self._read_metadata(connection.recv(timeout=timeout_s))
        except BaseException:
            connection.close()
            raise
        self._metadata = metadata
        return connection

    def _read_metadata(self, frame: str | bytes) -> ServerMetadata:
        try:
            metadata = msgspec.msgpack.decode(
                frame if isinstance(frame, bytes) else b"", type=ServerMetadata
            )
        except msgspec.DecodeError as error:
            raise explain(
                self.uri, f"is no quantvla server ({error})", remedy="use its own client"
            ) from error
        if metadata.protocol != PROTOCOL:
            raise explain(
                self.uri,
                f"speaks another protocol than {PROTOCOL}",
                got=metadata.protocol,
                remedy="install the same quantvla on both machines",
            )
        if self._metadata is not None and _contract(metadata) != _contract(self._metadata):
            raise explain(
                self.uri,
                "the server came back with another engine",
                got=f"{metadata.family} {metadata.recipe}",
                remedy="make a new client once the robot stands still",
            )
        return metadata

    def _checked(self, actions: object) -> FloatArray:
        """Return the actions if they are what the metadata promised."""
        shape = (self.metadata.action.horizon, self.metadata.action.dim)
        if (
            not isinstance(actions, np.ndarray)
            or actions.shape != shape
            or actions.dtype.kind != "f"
            or not np.isfinite(actions).all()
        ):
            raise explain(
                self.uri,
                f"expected finite actions of shape {shape}",
                got=getattr(actions, "shape", type(actions).__name__),
                remedy="check the server's log",
            )
        return actions.astype(np.float32)

    def _refused(self, error: InvalidStatus) -> QuantVLAError:
        body = (error.response.body or b"").decode(errors="replace").strip()
        return explain(
            self.uri,
            "the server refused the connection",
            got=f"{error.response.status_code} {body}",
            remedy="check the key and the number of clients",
        )

    def _unreachable(self, error: BaseException) -> QuantVLAError:
        return explain(
            self.uri,
            "no answer in time",
            got=f"{type(error).__name__} {error}".strip(),
            remedy="hold the robot; check that quantvla serve runs and how long a chunk takes",
        )


def _is_final(error: BaseException) -> bool:
    """Return whether the server closed for something that sending it again would repeat."""
    code = error.rcvd.code if isinstance(error, ConnectionClosed) and error.rcvd else None
    return code in (1003, 1007, 1008, 1009)


def _contract(metadata: ServerMetadata) -> tuple[object, ...]:
    """Return what may not change under a running robot."""
    return (
        metadata.checkpoint_sha256,
        metadata.recipe,
        metadata.cameras,
        metadata.state,
        metadata.task_key,
        metadata.action,
        metadata.noise_shape,
    )
