"""What a pass works on and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import msgspec
from torch import nn

from quantvla.plan import Plan
from quantvla.quantizer import QuantizedWeight
from quantvla.statistics import SiteStatistics


class WeightStore(Protocol):
    """Where finished integer weights are kept; what is in it survives a kill."""

    def __contains__(self, site: str) -> bool: ...
    def get(self, site: str) -> QuantizedWeight: ...
    def put(self, site: str, weight: QuantizedWeight) -> None: ...


@dataclass(frozen=True)
class Subject:
    """The policy under the passes: its float modules, its statistics and its integer weights so far."""

    policy: nn.Module
    plan: Plan
    statistics: Mapping[str, SiteStatistics]
    weights: WeightStore


class SiteError(msgspec.Struct, frozen=True):
    """Error of one site's integer weight.

    ``relative_output_error``: sqrt of E|x (W - Ŵ)|² / E|x W|², with the second moments of the
    input channels taken as uncorrelated; ``relative_weight_error``: |W - Ŵ| / |W| (Frobenius).
    """

    site: str
    relative_weight_error: float
    relative_output_error: float


class PassReport(msgspec.Struct, frozen=True):
    """What a pass did."""

    kind: str
    sites: tuple[SiteError, ...]
