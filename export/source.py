"""What an engine is made from: a policy in memory, and what its manifest says about its origin."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from msgspec import structs

from quantvla.calib_sets import RobotSpec
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
        loaded = with_names(loaded, card.calibration.robot)
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


def with_names(loaded: LoadedPolicy, robot: RobotSpec) -> LoadedPolicy:
    """Return the policy with the names of its state and action entries, which a checkpoint lacks and a robot has."""
    interface = loaded.interface
    state, action = interface.state, interface.action
    if not state.names and robot.state.dim == state.dim:
        state = structs.replace(state, names=robot.state.names)
    if not action.names and robot.action is not None and robot.action.dim == action.dim:
        action = structs.replace(action, names=robot.action.names)
    return replace(loaded, interface=replace(interface, state=state, action=action))
