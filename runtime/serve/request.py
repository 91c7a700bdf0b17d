"""A decoded message -> an observation of the engine, with the noise to start from."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from quantvla.runtime.errors import QuantVLAError, explain, nearest
from quantvla.runtime.guidance import ActionPrefix, Method, Schedule
from quantvla.runtime.manifest import Manifest
from quantvla.runtime.serve.wire import Message

MAX_IMAGE_PIXELS = 1 << 24
NOISE, SEED, PREFIX = "noise", "seed", "prefix"
_PROMPT = "prompt"


@dataclass(frozen=True)
class Request:
    """What a client asks for: the chunk for ``observation`` from ``noise``, or from ``seed``, or neither.

    With ``prefix`` the chunk continues the one in progress.
    """

    observation: dict[str, object]
    noise: NDArray[np.floating] | None
    seed: int | None
    prefix: ActionPrefix | None


class _PrefixOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An `ActionPrefix` without its actions."""

    frozen: Annotated[int, msgspec.Meta(ge=0)]
    overlap: Annotated[int, msgspec.Meta(ge=1)] | None = None
    schedule: Schedule = "exponential"
    method: Method = "prefix"
    max_weight: Annotated[float, msgspec.Meta(gt=0)] = 10.0


class RequestReader:
    """Reads the messages of clients of one engine.

    A key of the engine is taken as it is. Otherwise ``renames`` (their name -> ours) decides, and
    then the names that openpi's robots use: ``prompt`` for the sentence, ``observation/x`` and ``x``
    for ``observation.x``, ``images: {cam: ...}`` and ``observation/images/cam`` for
    ``observation.images.cam``. A camera may be an array or the bytes of a JPEG file.
    """

    def __init__(self, manifest: Manifest, renames: Mapping[str, str]) -> None:
        self._cameras = frozenset(camera.key for camera in manifest.cameras)
        self._known = self._cameras | {manifest.state.key, manifest.task_key}
        self._task_key = manifest.task_key
        self._renames = dict(renames)
        for theirs, ours in self._renames.items():
            if ours not in self._known:
                raise explain(
                    f"rename {theirs}={ours}",
                    f"the engine does not read {ours!r}",
                    remedy=nearest(ours, self._known),
                )

    def read(self, message: Message) -> Request:
        """Return the request; raises `QuantVLAError` that names the key and what is wrong with it.

        Whether the observation is complete and of the right shapes is checked by the policy.
        """
        observation: dict[str, object] = {}
        given = {key: value for key, value in message.items() if key not in (NOISE, SEED, PREFIX)}
        for theirs, value in _flattened(given):
            key = self._ours(theirs)
            if key in observation:
                raise explain(
                    f"observation {key!r}",
                    "is given twice",
                    got=f"{theirs!r} besides it",
                    remedy="send it once",
                )
            if key in self._cameras and isinstance(value, bytes):
                value = decode_jpeg(key, value)
            observation[key] = value
        return Request(
            observation,
            _noise(message.get(NOISE)),
            _seed(message.get(SEED)),
            _prefix(message.get(PREFIX)),
        )

    def _ours(self, theirs: str) -> str:
        """Return the engine's key for a client's key, or that key itself if it has no counterpart."""
        if theirs in self._known:
            return theirs
        if theirs in self._renames:
            return self._renames[theirs]
        if theirs == _PROMPT:
            return self._task_key
        dotted = theirs.replace("/", ".")
        for key in (dotted, f"observation.{dotted}"):
            if key in self._known:
                return key
        return theirs


def _flattened(message: Message) -> Iterator[tuple[str, object]]:
    """Yield keys and values, a map inside ``message`` as ``outer/inner``."""
    for key, value in message.items():
        if isinstance(value, dict):
            yield from ((f"{key}/{inner}", part) for inner, part in value.items())
        else:
            yield key, value


def decode_jpeg(key: str, data: bytes) -> NDArray[np.uint8]:
    """Return the pixels of a JPEG file, (height, width, 3) uint8 for a colour image.

    The size in the file's header is checked before any pixel is decoded.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise _jpeg_error(key, f"{image.width}x{image.height} pixels")
            return np.asarray(image)
    except QuantVLAError:
        raise
    except Exception as error:  # Pillow's decoders raise many types for bytes that are no image
        raise _jpeg_error(key, f"{len(data)} bytes that do not decode ({error})") from error


def _jpeg_error(key: str, got: str) -> QuantVLAError:
    return explain(
        f"observation {key!r}",
        f"byte strings under a camera must be a JPEG file of at most {MAX_IMAGE_PIXELS} pixels",
        got=got,
        remedy="send the uint8 array or an intact JPEG",
    )


def _noise(value: object) -> NDArray[np.floating] | None:
    if value is None or isinstance(value, np.ndarray):
        return value
    raise explain(NOISE, "expected an array", got=type(value).__name__, remedy="send float32")


def _prefix(value: object) -> ActionPrefix | None:
    if value is None:
        return None
    actions = value.get("actions") if isinstance(value, dict) else None
    if (
        not isinstance(value, dict)
        or not isinstance(actions, np.ndarray)
        or actions.dtype.kind != "f"
    ):
        raise explain(
            PREFIX,
            "expected a map with floats 'actions' (n, dim) and 'frozen'",
            got=type(value).__name__ if not isinstance(value, dict) else ", ".join(value),
            remedy="send what the robot runs meanwhile, or leave it out",
        )
    rest = {key: entry for key, entry in value.items() if key != "actions"}
    try:
        options = msgspec.convert(rest, _PrefixOptions)
    except msgspec.ValidationError as error:
        raise explain(PREFIX, f"not as expected ({error})", remedy="correct that entry") from error
    return ActionPrefix(
        actions.astype(np.float32),
        options.frozen,
        options.overlap,
        options.schedule,
        options.method,
        options.max_weight,
    )


def _seed(value: object) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise explain(SEED, "expected a whole number >= 0", got=repr(value), remedy="change it")
