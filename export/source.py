"""What an engine is made from: a policy in memory, and what its manifest says about its origin."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantvla.checkpoint import is_quantized, load_quantized
from quantvla.families import load_policy
from quantvla.families.base import LoadedPolicy
from quantvla.plan import Plan
from quantvla.runtime.files import sha256_tree
from quantvla.runtime.manifest import Source

FLOAT_RECIPE = "float"


@dataclass(frozen=True)
class SourcePolicy:
    """A loaded checkpoint; ``plan`` is None for a float one."""

    loaded: LoadedPolicy
    recipe: str
    plan: Plan | None
    origin: Source


def load_source(checkpoint: Path) -> SourcePolicy:
    """Load a LeRobot checkpoint (float) or a quantized one (integer linears in place)."""
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
