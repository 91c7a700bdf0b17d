"""Pictures of a set on disk: JPEG at quality 95 without chroma subsampling, or PNG."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from quantvla.runtime.errors import explain
from quantvla.runtime.manifest import CameraSpec

ImageFormat = Literal["jpeg", "png"]
SUFFIX: dict[ImageFormat, str] = {"jpeg": ".jpg", "png": ".png"}
JPEG_QUALITY = 95


def encode_image(image: npt.NDArray[np.uint8], image_format: ImageFormat) -> bytes:
    """Return an image (height, width, 3) uint8 RGB as the bytes of a JPEG or PNG file."""
    stream = io.BytesIO()
    options: dict[str, Any] = (
        {"quality": JPEG_QUALITY, "subsampling": 0, "optimize": True}
        if image_format == "jpeg"
        else {"optimize": True}
    )
    Image.fromarray(np.ascontiguousarray(image)).save(stream, image_format.upper(), **options)
    return stream.getvalue()


def decode_image(path: Path, camera: CameraSpec) -> npt.NDArray[np.uint8]:
    """Return the picture in ``path`` as (height, width, 3) uint8 RGB.

    Raises `QuantVLAError` for a missing, truncated, foreign or wrongly sized file.
    """
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as picture:
            found = f"{picture.height}x{picture.width} {picture.mode}"
            if found != f"{camera.height}x{camera.width} RGB":
                raise explain(
                    f"{path} {camera.key}",
                    f"must be {camera.height}x{camera.width} RGB",
                    got=found,
                    remedy="copy or build the set again",
                )
            return np.array(picture, dtype=np.uint8)
    except UnidentifiedImageError as error:
        raise explain(
            f"{path} {camera.key}", "is not a JPEG or PNG image", remedy="copy the set again"
        ) from error
    except OSError as error:
        raise explain(
            f"{path} {camera.key}",
            f"the image is truncated or unreadable ({error})",
            remedy="copy the set again",
        ) from error
