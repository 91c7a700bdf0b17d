"""What an engine is made from: a policy in memory, and what its manifest says about its origin."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from quantvla.checkpoint import is_quantized, load_quantized
from quantvla.families import load_policy
from quantvla.families.base import LoadedPolicy
from quantvla.plan import Plan
from quantvla.runtime.files import sha256_tree
from quantvla.runtime.manifest import Source
from quantvla.schedule import Schedule, scheduled

FLOAT_RECIPE = "float"


@dataclass(frozen=True)
class SourcePolicy:
    """A loaded checkpoint; ``plan`` is None for a float one."""

    loaded: LoadedPolicy
    recipe: str
    plan: Plan | None
    origin: Source


def load_source(checkpoint: Path, schedule: Schedule | None = None) -> SourcePolicy:
    """Load a LeRobot checkpoint (float) or a quantized one (integer linears in place).

    With ``schedule`` the policy denoises at its times.
    """
    source = _load(checkpoint)
    if schedule is None:
        return source
    loaded = scheduled(source.loaded, source.origin.checkpoint_sha256, schedule)
    return replace(source, loaded=loaded)


def _load(checkpoint: Path) -> SourcePolicy:
    if is_quantized(checkpoint):
        loaded, card = load_quantized(checkpoint)
        origin = Source(
            checkpoint_sha256=card.source_sha256, policy_type=loaded.family,
            calibration_sha256=card.calibration.sha256,
        )  # fmt: skip
        return SourcePolicy(loaded, card.recipe.name, card.plan, origin)
    loaded = load_policy(checkpoint)
    origin = Source(
        checkpoint_sha256=sha256_tree(checkpoint),
        policy_type=loaded.family,
        calibration_sha256=None,
    )
    return SourcePolicy(loaded, FLOAT_RECIPE, None, origin)
