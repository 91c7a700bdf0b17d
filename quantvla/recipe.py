"""Recipes: which sites get which scheme, and the passes that get them there. A TOML file."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import msgspec

from quantvla.families.base import Site
from quantvla.passes import Pass
from quantvla.runtime.errors import explain, nearest

_BUNDLED = Path(__file__).parent / "recipes"
Names = Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
Blocks = Annotated[tuple[Annotated[int, msgspec.Meta(ge=16)], ...], msgspec.Meta(min_length=1)]


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Selects sites (all given selectors must hold) and gives them a scheme.

    ``site`` are shell patterns on the site's name. ``block``: block sizes in order of preference;
    the first that divides a site's input dimension is taken.
    """

    scheme: str
    reason: str
    part: Names | None = None
    role: Names | None = None
    kind: Names | None = None
    stage: Names | None = None
    site: Names | None = None
    block: Blocks = (32,)

    def matches(self, site: Site) -> bool:
        """Return whether every selector that is given holds for ``site``."""
        selected = (
            (self.part, site.part),
            (self.role, site.role),
            (self.kind, site.kind),
            (self.stage, site.stage),
        )
        return all(names is None or value in names for names, value in selected) and (
            self.site is None or any(fnmatchcase(site.name, pattern) for pattern in self.site)
        )

    def describe(self) -> str:
        """Return the selectors as they stand in the file."""
        fields = ("part", "role", "kind", "stage", "site")
        given = [f"{f}={list(getattr(self, f))}" for f in fields if getattr(self, f) is not None]
        return " ".join(given) or "every site"


class Default(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The scheme of sites that no rule selects."""

    scheme: str
    reason: str
    block: Blocks = (32,)


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Ordered rules (the first that matches a site decides) and ordered passes."""

    name: str
    rules: tuple[Rule, ...]
    default: Default
    passes: tuple[Pass, ...]


def bundled_recipes() -> tuple[str, ...]:
    """Return the names of the recipes that come with the package."""
    return tuple(sorted(path.stem for path in _BUNDLED.glob("*.toml")))


def read_recipe(name_or_path: str) -> Recipe:
    """Return the bundled recipe of that name, or the one in the TOML file at that path."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = _BUNDLED / f"{name_or_path}.toml"
        if not path.is_file():
            raise explain(
                f"recipe {name_or_path!r}",
                "unknown",
                remedy=f"{nearest(name_or_path, bundled_recipes())} or give the path of a .toml file",
            )
    if not path.is_file():
        raise explain(
            path, "no such file", remedy="give a recipe's name or the path of a .toml file"
        )
    try:
        recipe = msgspec.toml.decode(path.read_bytes(), type=Recipe)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise explain(path, f"not a valid recipe ({error})", remedy="correct that key") from error
    _require_order(path, recipe)
    return recipe


_PHASES = ("equivalence", "rounding", "correction")


def _require_order(path: Path, recipe: Recipe) -> None:
    """Raise unless folds come before rounding, corrections after it, and rotations once."""
    latest = 0
    kinds = [step.__struct_config__.tag for step in recipe.passes]
    for kind in ("rotate", "permute"):
        if kinds.count(kind) > 1:
            raise explain(
                path,
                f"has pass {kind} twice, and the second would undo part of the first",
                remedy="leave one of them out",
            )
    for step in recipe.passes:
        phase = _PHASES.index(step.phase)
        if phase < latest:
            raise explain(
                path,
                f"pass {step.__struct_config__.tag} ({step.phase}) comes after a {_PHASES[latest]} pass",
                remedy=f"order the passes: {', '.join(_PHASES)}",
            )
        latest = phase
