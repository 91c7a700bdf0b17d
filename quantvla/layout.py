"""From a recipe's rules to a plan, before any weight is touched."""

from __future__ import annotations

from collections.abc import Sequence

from quantvla.families.base import Site
from quantvla.plan import Plan, PlanEntry
from quantvla.recipe import Default, Recipe, Rule
from quantvla.runtime.errors import explain
from quantvla.schemes import DROPPED, FLOAT, resolve_scheme


def make_plan(sites: Sequence[Site], recipe: Recipe) -> Plan:
    """Return the plan of ``recipe`` for a policy with ``sites``.

    Raises `QuantVLAError` for a rule that selects no site, or a block that does not fit a site.
    """
    deciding: dict[str, Rule | Default] = {}
    for rule in recipe.rules:
        matched = [site for site in sites if rule.matches(site)]
        taken = [site for site in matched if site.name not in deciding]
        if not taken:
            wrong = (
                "every site it selects is taken by an earlier rule"
                if matched
                else "it selects no site"
            )
            raise explain(
                f"recipe {recipe.name!r}, rule {rule.describe()}",
                wrong,
                remedy=f"parts of this policy: {_values(sites, 'part')}; roles: "
                f"{_values(sites, 'role')}; kinds: {_values(sites, 'kind')}",
            )
        deciding.update({site.name: rule for site in taken})
    return Plan(
        recipe=recipe.name,
        entries=tuple(_entry(site, deciding.get(site.name, recipe.default)) for site in sites),
    )


def _entry(site: Site, rule: Rule | Default) -> PlanEntry:
    before = FLOAT.weight_bytes(site.out_features, site.in_features)
    if site.unused:
        scheme, after, reason = DROPPED, 0, site.unused
    else:
        scheme = resolve_scheme(
            rule.scheme, rule.block, site=site.name, in_features=site.in_features
        )
        after, reason = scheme.weight_bytes(site.out_features, site.in_features), rule.reason
    return PlanEntry(
        site=site.name, stage=site.stage, part=site.part, kind=site.kind, layer=site.layer,
        out_features=site.out_features, in_features=site.in_features,
        scheme=scheme, bytes_before=before, bytes_after=after, reason=reason,
    )  # fmt: skip


def _values(sites: Sequence[Site], field: str) -> str:
    return ", ".join(sorted({str(getattr(site, field)) for site in sites}))
