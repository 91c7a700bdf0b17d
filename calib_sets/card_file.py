"""``card.json`` on disk: written one frame a line, read with every check and checksum."""

from __future__ import annotations

from pathlib import Path

import msgspec

from quantvla.calib_sets.card import SCHEMA_VERSION, Card, check_card, subset_checksum
from quantvla.runtime.errors import explain
from quantvla.runtime.files import sha256_file

CARD_FILE = "card.json"


def encode_card(card: Card) -> bytes:
    """Return the card as indented JSON, one frame a line."""
    header = msgspec.structs.replace(card, frames=())
    lines = ",\n".join("  " + msgspec.json.encode(entry).decode() for entry in card.frames)
    text = msgspec.json.format(msgspec.json.encode(header), indent=1).decode()
    return (text.replace('"frames": []', f'"frames": [\n{lines}\n ]', 1) + "\n").encode()


def read_card(directory: Path) -> Card:
    """Return the card of a set after checking its schema, its consistency and its checksum."""
    path = directory / CARD_FILE
    data = path.read_bytes()
    _check_schema(path, data)
    try:
        card = msgspec.json.decode(data, type=Card)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise explain(
            path, f"is not a valid card ({error})", remedy="copy or build the set again"
        ) from error
    check_card(card, directory)
    if card.checksum != subset_checksum(card, card.frames):
        raise explain(
            path, "checksum mismatch: the card was changed", remedy="copy or build the set again"
        )
    for index, entry in enumerate(card.frames):
        if set(entry.images) != {camera.key for camera in card.robot.cameras}:
            raise explain(
                f"{path} frame {index}",
                "must have one image of every camera",
                got=sorted(entry.images),
                remedy="build the set again",
            )
    return card


def check_images(directory: Path, card: Card) -> None:
    """Raise `QuantVLAError` if an image of the card is missing or its SHA-256 differs."""
    for entry in card.frames:
        for image in entry.images.values():
            path = directory / image.file
            if not path.is_file():
                raise explain(path, "listed in the card but missing", remedy="copy the set again")
            found = sha256_file(path)
            if found != image.sha256:
                raise explain(
                    path,
                    f"checksum mismatch, expected {image.sha256[:12]}…",
                    got=f"{found[:12]}…",
                    remedy="copy the set again",
                )


def _check_schema(path: Path, data: bytes) -> None:
    class Header(msgspec.Struct):
        schema_version: int

    try:
        version = msgspec.json.decode(data, type=Header).schema_version
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise explain(
            path,
            f"is not the card of a calibration set ({error})",
            remedy="copy or build the set again",
        ) from error
    if version != SCHEMA_VERSION:
        raise explain(
            path,
            f"schema version must be {SCHEMA_VERSION}",
            got=version,
            remedy="upgrade quantvla" if version > SCHEMA_VERSION else "build the set again",
        )
