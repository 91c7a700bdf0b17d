"""A policy in memory with its linears rounded to nearest: what comes after `quantize`, without a calibration set."""

from __future__ import annotations

from typing import Any

from quantvla.checkpoint import install_
from quantvla.export.source import SourcePolicy
from quantvla.families.base import LoadedPolicy
from quantvla.layout import make_plan
from quantvla.plan import Plan
from quantvla.quantizer import quantize_weight
from quantvla.recipe import Default, Recipe, Rule
from quantvla.runtime.manifest import Source

TOWERS = Recipe(
    name="towers",
    passes=(),
    rules=(Rule(scheme="float", reason="outside the towers", part=("encoder", "decoder")),),
    default=Default(scheme="w4a8", reason="towers", block=(32, 16)),
)
"""All linears of the towers, vision too, on a 4-bit grid."""


def rounded_source(loaded: LoadedPolicy, recipe: Recipe = TOWERS) -> SourcePolicy:
    """Return a policy as an export source, the recipe's integer linears put in place."""
    plan = make_plan(loaded.sites, recipe)
    quantize_in_memory_(loaded, plan)
    return source_of(loaded, plan)


def source_of(loaded: LoadedPolicy, plan: Plan) -> SourcePolicy:
    """Return the policy in memory as an export source."""
    origin = Source(checkpoint_sha256="0" * 64, policy_type=loaded.family, calibration_sha256=None)
    return SourcePolicy(loaded, plan.recipe, plan, origin)


def quantize_in_memory_(loaded: LoadedPolicy, plan: Plan) -> None:
    """Replace the plan's linears by integer ones, rounded without weighting."""
    weights = {}
    for entry in plan.quantized:
        linear: Any = loaded.policy.get_submodule(entry.site)
        weights[entry.site] = quantize_weight(
            linear.weight, entry.scheme.weight_bits, entry.scheme.block
        )
    install_(loaded.policy, weights)
