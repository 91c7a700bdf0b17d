"""What a pass works on and what it returns.

There are three kinds. *Equivalence* passes fold something into the float weights and change no output; *rounding*
passes make the integers; *correction* passes touch up what rounding left. They run in this order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import msgspec
from torch import Tensor, nn

from quantvla.float_weights import FloatWeights
from quantvla.plan import Plan, PlanEntry
from quantvla.quantizer import QuantizedWeight
from quantvla.statistics import InputMoments, LogitSums, OutputSums, SiteStatistics
from quantvla.structure import Structure

Kind = Literal["equivalence", "rounding", "correction"]


class WeightStore(Protocol):
    """Where finished integer weights are kept; what is in it survives a kill."""

    def __contains__(self, site: str) -> bool: ...
    def get(self, site: str) -> QuantizedWeight: ...
    def put(self, site: str, weight: QuantizedWeight) -> None: ...


class Matching(Protocol):
    """How far the policy with some linears replaced is from the teacher, differentiable in what stands there."""

    def loss(self, linears: Mapping[str, nn.Module], draw: int) -> Tensor:
        """Return the relative squared velocity error on one frame and noise; ``draw`` chooses both."""
        ...


class Observer(Protocol):
    """Runs the policy as it stands over the calibration set.

    The student has the integer weights that are finished, the teacher none; both see the same
    observations and the teacher's denoising states.
    """

    frames: int

    def statistics(self) -> Mapping[str, SiteStatistics]:
        """Return what every planned site's float input looks like."""
        ...

    def moments(
        self, sites: Sequence[str], *, unfinished: Sequence[str], attended: bool, what: str
    ) -> Mapping[str, InputMoments]:
        """Return the moments of these sites' inputs in the student, and with those in the teacher.

        Sites in ``unfinished`` stay float in the student, whether they have integers already or not.
        ``attended``: context tokens count as much as the action head looks at them.
        """
        ...

    def first_call(self, sites: Sequence[str]) -> Mapping[str, Tensor]:
        """Return the inputs (tokens, in) of these sites in the first call of the first frame."""
        ...

    def logits(
        self, queries: Sequence[str], *, what: str, frames: int | None = None
    ) -> Mapping[str, LogitSums]:
        """Return the spread of attention logits per head, by query projection; over the first ``frames`` only."""
        ...

    def outputs(
        self, sites: Sequence[str], *, what: str, frames: int | None = None
    ) -> Mapping[str, OutputSums]:
        """Return the outputs of these linears per channel; over the first ``frames`` only."""
        ...

    def matching(self, what: str) -> Matching:
        """Return the comparison of a student's velocities with the teacher's."""
        ...

    def corrected(self) -> None:
        """Take notice that weights the student has were corrected."""
        ...

    def forward_order(self, sites: Sequence[str]) -> Sequence[str]:
        """Return the sites in the order in which a run reaches them."""
        ...


@dataclass(frozen=True)
class Subject:
    """The policy under the passes: its float modules and structure, its integer weights so far, and eyes.

    ``siblings``: for each linear, itself and those that read the same input, sorted.
    ``scratch``: a directory for what the running pass needs to continue after a kill; emptied when it ends.
    """

    policy: nn.Module
    plan: Plan
    structure: Structure
    siblings: Mapping[str, tuple[str, ...]]
    floats: FloatWeights
    weights: WeightStore
    observer: Observer
    scratch: Path

    @property
    def planned(self) -> dict[str, PlanEntry]:
        """The entries that become integers, by site."""
        return {entry.site: entry for entry in self.plan.quantized}

    def linear(self, site: str) -> nn.Linear:
        """Return the float linear of a site."""
        module = self.policy.get_submodule(site)
        assert isinstance(module, nn.Linear), site
        return module


@dataclass(frozen=True)
class Fold:
    """One step of an equivalence pass, named after the site or module that a message should name."""

    site: str
    apply: Callable[[], None]


class SiteError(msgspec.Struct, frozen=True):
    """Error of one site's integer weight.

    ``relative_output_error``: sqrt of E|x (W - Ŵ)|² / E|x W|² over the calibration set, with the
    full second moments of the input where the pass has them, else with those of its channels taken
    as uncorrelated; ``relative_weight_error``: |W - Ŵ| / |W| (Frobenius); ``rows``: inputs seen.
    """

    site: str
    rows: int
    relative_weight_error: float
    relative_output_error: float


class Equivalence(msgspec.Struct, frozen=True):
    """Action chunks after a fold against those of the untouched policy, on some calibration frames."""

    frames: int
    cosine_min: float
    max_abs: float


class Factors(msgspec.Struct, frozen=True):
    """What a correction multiplies one attention with: as measured, and after neutral band and clip."""

    site: str
    part: str
    layer: int
    raw: tuple[float, ...]
    applied: tuple[float, ...]


class PassReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a pass did. ``notes`` are sentences a reader must see."""

    kind: str
    sites: tuple[SiteError, ...] = ()
    folds: int = 0
    equivalence: Equivalence | None = None
    factors: tuple[Factors, ...] = ()
    clip: float | None = None
    band: float | None = None
    notes: tuple[str, ...] = ()
