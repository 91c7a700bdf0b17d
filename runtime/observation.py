"""Checks on what a robot hands in, each message naming the key, what was expected and what came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.errors import QuantVLAError, explain, nearest

_IMAGE_PREFIX = "observation.image"


def read_key(obs: Mapping[str, object], key: str, kind: str) -> object:
    """Return ``obs[key]``; raises `QuantVLAError` that offers the nearest key when it is missing."""
    if key not in obs:
        close = nearest(key, map(str, obs)) if obs else "the observation is empty"
        raise explain(f"observation {key!r}", f"{kind} is missing", remedy=f"add it ({close})")
    return obs[key]


def check_no_other_images(obs: Mapping[str, object], known: frozenset[str]) -> None:
    """Raise `QuantVLAError` if ``obs`` holds an image under a key that the policy does not read.

    An image is an array of two or more axes, or anything under ``observation.image*``. Other
    unknown keys (time stamps, indices, rewards) are ignored.
    """
    for key, value in obs.items():
        if key in known:
            continue
        if str(key).startswith(_IMAGE_PREFIX) or getattr(value, "ndim", 0) >= 2:
            raise explain(
                f"observation {key!r}",
                "unexpected camera, this policy does not read it",
                remedy=f"rename or remove it ({nearest(str(key), known)})",
            )


def read_image(obs: Mapping[str, object], key: str) -> NDArray[np.uint8]:
    """Return the (height, width, 3) uint8 RGB image at ``key``, or raise `QuantVLAError`."""
    image = read_key(obs, key, "camera image")
    if not isinstance(image, np.ndarray):
        raise _image_error(
            key, f"{type(image).__module__}.{type(image).__name__}", "convert it with np.asarray"
        )
    if image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8 and image.size:
        return image
    got = f"{image.dtype} {image.shape}"
    if image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 1):
        raise _image_error(key, f"grayscale {got}", "pass the colour image")
    if image.ndim == 4:
        raise _image_error(key, f"a batch {got}", "pass one image without the leading axis")
    if image.ndim != 3:
        raise _image_error(key, got, "pass one colour image")
    if image.shape[2] == 4:
        raise _image_error(key, f"RGBA {got}", "drop the alpha channel: image[..., :3]")
    if image.shape[2] != 3 and image.shape[0] in (1, 3, 4):
        raise _image_error(key, f"CHW {got}", "transpose it: image.transpose(1, 2, 0)")
    if image.shape[2] != 3:
        raise _image_error(key, got, "pass one colour image")
    if image.dtype != np.uint8:
        raise _image_error(key, got, "pass the camera's uint8 pixels (0..255), not scaled ones")
    raise _image_error(key, f"an empty image {got}", "check the camera")


def _image_error(key: str, got: str, remedy: str) -> QuantVLAError:
    return explain(
        f"observation {key!r}",
        "expected an RGB image, numpy uint8 of shape (height, width, 3)",
        got=got,
        remedy=remedy,
    )


def read_vector(
    obs: Mapping[str, object], key: str, dim: int | None, names: Sequence[str] = ()
) -> NDArray[np.float32]:
    """Return the (dim,) float32 vector at ``key``, or raise `QuantVLAError`.

    ``dim`` None accepts any length; ``names`` of the entries are used in messages.
    """
    value = np.asarray(read_key(obs, key, "vector"))
    expected = f"expected a vector of {'any' if dim is None else dim} numbers"
    if value.dtype.kind not in "fiu":
        raise explain(
            f"observation {key!r}", expected, got=f"dtype {value.dtype}", remedy="pass float32"
        )
    if value.ndim != 1 or (dim is not None and value.shape[0] != dim):
        order = f" in the order {', '.join(names)}" if names else ""
        raise explain(
            f"observation {key!r}",
            expected,
            got=f"shape {value.shape}",
            remedy=f"pass the raw vector{order}",
        )
    if not np.isfinite(value).all():
        bad = [names[i] if names else str(i) for i in np.flatnonzero(~np.isfinite(value))]
        raise explain(
            f"observation {key!r}",
            "must be finite",
            got=f"NaN or infinity at {', '.join(bad)}",
            remedy="check the sensor",
        )
    return value.astype(np.float32)


def read_text(obs: Mapping[str, object], key: str) -> str:
    """Return the text at ``key``, or raise `QuantVLAError` if it is missing, empty or not a str."""
    text = read_key(obs, key, "instruction")
    if not isinstance(text, str):
        raise explain(
            f"observation {key!r}",
            "expected the instruction as str",
            got=type(text).__name__,
            remedy="pass one sentence",
        )
    if not text.strip():
        raise explain(
            f"observation {key!r}",
            "the instruction is empty",
            got=repr(text),
            remedy="say what the robot is to do, in the words of the training data",
        )
    return text
