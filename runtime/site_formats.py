"""Which number format each linear of a TensorRT engine is planned to run in; a file of the engine."""

from __future__ import annotations

from pathlib import Path

import msgspec

from quantvla.runtime.errors import explain

FORMATS_FILE = "formats.json"


class SiteFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One linear: ``node`` is the name of its matrix product in the stage's graph; bytes are of the weight."""

    site: str
    stage: str
    node: str
    format: str
    weight_bytes: int
    reason: str


class EmbeddingFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table that token ids look up and that has fewer bits than half precision: its bytes before and now."""

    table: str
    stage: str
    format: str
    half_bytes: int
    bytes: int


class SiteFormats(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All linears of an engine in graph order, and the format of everything between them."""

    board: str
    compute_capabilities: tuple[int, ...]
    activations: str
    sites: tuple[SiteFormat, ...]
    embeddings: tuple[EmbeddingFormat, ...] = ()

    def of_stage(self, stage: str) -> tuple[SiteFormat, ...]:
        """Return the linears of one stage."""
        return tuple(site for site in self.sites if site.stage == stage)


def encode_formats(formats: SiteFormats) -> bytes:
    """Return the file's content."""
    return msgspec.json.format(msgspec.json.encode(formats), indent=1) + b"\n"


def read_formats(directory: Path) -> SiteFormats:
    """Return the formats of an engine directory; raises `QuantVLAError` if it has none."""
    path = directory / FORMATS_FILE
    if not path.is_file():
        raise explain(
            directory,
            f"not an engine for TensorRT (no {FORMATS_FILE})",
            remedy="export with --target jetson-orin, jetson-thor or rtx",
        )
    try:
        return msgspec.json.decode(path.read_bytes(), type=SiteFormats)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise explain(
            path, f"not readable by this version ({error})", remedy="export the engine again"
        ) from error
