"""What the rewrites did to an engine's graphs; a file of the engine, so that a rule that stops applying shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import onnx_ir as ir

REWRITES_FILE = "rewrites.json"


class StageRewrites(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One stage: how often each rule changed its graph, and the softmax nodes that no fused attention took in.

    Those attentions run as they were exported, which is slower and still right.
    """

    stage: str
    applied: dict[str, int]
    unfused_attention: tuple[str, ...]


def unfused_attention(model: ir.Model) -> tuple[str, ...]:
    """Return the names of the softmax nodes of a graph whose attentions should be single operators."""
    return tuple(str(node.name) for node in model.graph if node.op_type == "Softmax")


def encode_rewrites(stages: Sequence[StageRewrites]) -> bytes:
    """Return the file's content."""
    return msgspec.json.format(msgspec.json.encode(stages), indent=1) + b"\n"


def read_rewrites(engine: Path) -> tuple[StageRewrites, ...]:
    """Return what was written with an engine, nothing for one whose target has no fusing rewrites."""
    path = engine / REWRITES_FILE
    if not path.is_file():
        return ()
    return msgspec.json.decode(path.read_bytes(), type=tuple[StageRewrites, ...])
