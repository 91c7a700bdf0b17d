"""The plan: which scheme every site gets, what that costs in bytes, and why."""

from __future__ import annotations

import msgspec

from quantvla.schemes import DROPPED, FLOAT, Scheme

CARD_FILE = "quantized.json"
"""Where a quantized checkpoint keeps its plan and everything else that is known about it."""


class PlannedSite(msgspec.Struct, frozen=True):
    """Which linear a row of a plan is about."""

    site: str
    stage: str
    part: str
    kind: str
    layer: int | None
    out_features: int
    in_features: int


class PlanEntry(PlannedSite, frozen=True):
    """One site's fate. Bytes are of the weight: ``bytes_before`` in half precision, ``bytes_after`` with scales."""

    scheme: Scheme
    bytes_before: int
    bytes_after: int
    reason: str

    @property
    def quantized(self) -> bool:
        """True when the weight becomes integers."""
        return self.scheme.name not in (FLOAT.name, DROPPED.name)


class Plan(msgspec.Struct, frozen=True):
    """Every linear of the policy, in module order."""

    recipe: str
    entries: tuple[PlanEntry, ...]

    @property
    def quantized(self) -> tuple[PlanEntry, ...]:
        """The entries whose weights become integers."""
        return tuple(entry for entry in self.entries if entry.quantized)

    @property
    def dropped(self) -> tuple[PlanEntry, ...]:
        """The entries that inference never reads and that are not stored."""
        return tuple(entry for entry in self.entries if entry.scheme == DROPPED)

    def saving(self) -> float:
        """Return the share of half-precision bytes saved on the quantized sites, scales counted."""
        before = sum(entry.bytes_before for entry in self.quantized)
        after = sum(entry.bytes_after for entry in self.quantized)
        return 1.0 - after / before if before else 0.0
