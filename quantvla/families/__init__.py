"""The families this compiler knows: one line each."""

from __future__ import annotations

import json
from pathlib import Path

from quantvla.families import groot, pi, smolvla
from quantvla.families.base import Family, LoadedPolicy
from quantvla.runtime.errors import explain, nearest

FAMILIES: dict[str, Family] = {
    family.policy_type: family for family in (smolvla.FAMILY, pi.PI0, pi.PI05, groot.FAMILY)
}


def policy_type(directory: Path) -> str:
    """Return the ``type`` a LeRobot checkpoint directory names in its config.json."""
    config = directory / "config.json"
    if not config.is_file():
        raise explain(
            directory,
            "not a LeRobot checkpoint (no config.json)",
            remedy="give the directory with config.json and model.safetensors "
            "(often named pretrained_model)",
        )
    try:
        kind = json.loads(config.read_text())["type"]
    except (ValueError, KeyError, TypeError) as error:
        raise explain(
            config,
            "not the configuration of a LeRobot policy (no policy type in it)",
            remedy="give the directory that lerobot's save_pretrained wrote",
        ) from error
    return str(kind)


def load_policy(directory: Path, absent: frozenset[str] = frozenset()) -> LoadedPolicy:
    """Load a LeRobot checkpoint of any known family, in float32 on the CPU, ready for inference.

    Parameters named in ``absent`` may be missing (those that are stored as integers elsewhere).

    Raises `QuantVLAError` when it is no checkpoint, of an unknown family, or its weights are not
    exactly those that the policy class has.
    """
    kind = policy_type(directory)
    if kind not in FAMILIES:
        raise explain(
            directory / "config.json",
            "policy type has no family here",
            got=repr(kind),
            remedy=nearest(kind, FAMILIES),
        )
    return FAMILIES[kind].load(directory, absent)
