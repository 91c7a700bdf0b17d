"""Writing our own format: pictures, then the card, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec

from quantvla.calib_sets.calibration_set import CalibrationSet, select
from quantvla.calib_sets.card import Card, ImageFile, RobotSpec, Selection, change_card
from quantvla.calib_sets.card_file import CARD_FILE, encode_card
from quantvla.calib_sets.images import SUFFIX, ImageFormat, encode_image
from quantvla.calib_sets.stored import open_stored
from quantvla.runtime.errors import explain
from quantvla.runtime.files import atomic_directory

IMAGES_FOLDER = "images"


def build_set(
    source: CalibrationSet,
    output: Path,
    *,
    selection: Selection,
    name: str | None = None,
    image_format: ImageFormat = "jpeg",
    progress: Callable[[int, int], None] | None = None,
    overwrite: bool = False,
) -> CalibrationSet:
    """Write the frames of ``source`` that ``selection`` keeps to ``output`` as a set of our own format.

    Returns the set, opened again with its checksums verified. The same source, selection and
    format give the same bytes. ``progress`` is called with (frames written, frames in all).
    """
    chosen = select(source, selection)
    with atomic_directory(output, overwrite=overwrite) as directory:
        (directory / IMAGES_FOLDER).mkdir()
        images: list[dict[str, ImageFile]] = []
        for index, frame in enumerate(chosen):
            images.append(
                write_images(directory, index, frame.observation, chosen.robot, image_format)
            )
            if progress is not None:
                progress(index + 1, len(chosen))
        card = with_images(chosen, images, name or output.name, output)
        (directory / CARD_FILE).write_bytes(encode_card(card))
    return open_stored(output)


def write_images(
    directory: Path,
    index: int,
    observation: Mapping[str, Any],
    robot: RobotSpec,
    image_format: ImageFormat,
) -> dict[str, ImageFile]:
    """Write the pictures of frame ``index`` and return their entries for the card."""
    written: dict[str, ImageFile] = {}
    for camera in robot.cameras:
        data = encode_image(observation[camera.key], image_format)
        file = f"{IMAGES_FOLDER}/{index:05d}-{camera.key}{SUFFIX[image_format]}"
        try:
            (directory / file).write_bytes(data)
        except OSError as error:
            raise explain(
                directory / file,
                "could not be written",
                got=error,
                remedy="free space or choose another disk",
            ) from error
        written[camera.key] = ImageFile(file=file, sha256=sha256(data).hexdigest())
    return written


def with_images(
    frames: CalibrationSet, images: list[dict[str, ImageFile]], name: str, where: object
) -> Card:
    """Return the card of ``frames`` with their pictures, checked, under ``name``."""
    return change_card(
        frames.card,
        where,
        name=name,
        frames=tuple(
            msgspec.structs.replace(entry, images=files)
            for entry, files in zip(frames.entries, images, strict=True)
        ),
    )
