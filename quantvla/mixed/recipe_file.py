"""A choice of formats as a recipe that `quantvla quantize --recipe` takes."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec

from quantvla.families.base import Site
from quantvla.layout import make_plan
from quantvla.mixed.choose import MixedPlan
from quantvla.mixed.make import Result
from quantvla.mixed.offers import format_name
from quantvla.mixed.sensitivity import Choice
from quantvla.recipe import Recipe, Rule
from quantvla.runtime.errors import explain
from quantvla.runtime.files import write_atomic

_PATTERN_SIGNS = "*?["


def mixed_recipe(name: str, base: Recipe, choice: Choice, sites: tuple[Site, ...]) -> Recipe:
    """Return ``base`` with one rule for each format of ``choice`` before its own rules.

    Base rules whose sites are all chosen for are left out: such a rule is an error in a recipe.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for site, (_, scheme) in choice.items():
        if any(sign in site for sign in _PATTERN_SIGNS):
            raise explain(site, "its name is a pattern", remedy="rename that module")
        groups[format_name(scheme)].append(site)
    rules = []
    for form, members in sorted(groups.items()):
        scheme = choice[members[0]][1]
        blocked = not scheme.is_float and scheme.inputs != "uint8_tensor"
        rules.append(
            Rule(
                scheme=scheme.name, site=tuple(members), block=(scheme.block,) if blocked else (32,),
                reason=f"mixed precision: {len(members)} sites in {form}",
            )
        )  # fmt: skip
    return msgspec.structs.replace(base, name=name, rules=(*rules, *_left(base, choice, sites)))


def _left(base: Recipe, choice: Choice, sites: tuple[Site, ...]) -> list[Rule]:
    decided = set(choice)
    kept = []
    for rule in base.rules:
        taken = {site.name for site in sites if rule.matches(site)} - decided
        if taken:
            kept.append(rule)
            decided |= taken
    return kept


def write_mixed_recipe(path: Path, base: Recipe, result: Result, sites: tuple[Site, ...]) -> None:
    """Write the recipe of a result, named after its file, once it is sure that it can be used."""
    recipe = mixed_recipe(path.stem, base, result.choice, sites)
    make_plan(sites, recipe)
    write_recipe(path, recipe, _remarks(result.plan))


def _remarks(plan: MixedPlan) -> tuple[str, ...]:
    budgets = [
        f"{value:g} {unit}"
        for value, unit in ((plan.budget_mib, "MiB"), (plan.budget_ms, "ms a chunk"))
        if value is not None
    ]
    return (
        f"Formats chosen by `quantvla plan` within {' and '.join(budgets)} for the sites of recipe {plan.base_recipe}.",
        f"Action error (nrmse): predicted {plan.chosen.predicted_nrmse:.3%}, measured "
        f"{plan.chosen.measured_nrmse:.3%} on {plan.probe_frames} calibration frames; "
        f"{plan.base_recipe} measured {plan.base.measured_nrmse:.3%} at {plan.base.mib:.3f} MiB.",
        *plan.notes,
    )


def write_recipe(path: Path, recipe: Recipe, remarks: tuple[str, ...]) -> None:
    """Write the recipe as TOML with ``remarks`` as comments before it."""
    comments = "".join(f"# {line}\n" for line in remarks)
    body = msgspec.toml.encode(_without_none(msgspec.to_builtins(recipe)))
    write_atomic(path, comments.encode() + body)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(item) for item in value]
    return value
