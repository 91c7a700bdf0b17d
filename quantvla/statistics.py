"""What calibration measures at the input of each site, and how much of it was seen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantvla.runtime.errors import explain


@dataclass
class SiteStatistics:
    """Running statistics of one site's input, over all tokens of all calls.

    ``sum_squares`` (in,) float64; ``largest`` (in,) float32, the largest magnitude per channel.
    """

    sum_squares: Tensor
    largest: Tensor
    calls: int = 0
    tokens: int = 0

    @staticmethod
    def empty(in_features: int) -> SiteStatistics:
        """Return statistics that have seen nothing."""
        return SiteStatistics(
            torch.zeros(in_features, dtype=torch.float64), torch.zeros(in_features)
        )

    @property
    def second_moment(self) -> Tensor:
        """E[x_k^2] per input channel: (in,) float64."""
        return self.sum_squares / max(self.tokens, 1)

    def add_(self, x: Tensor) -> None:
        """Account for an input of shape (..., in)."""
        rows = x.detach().reshape(-1, x.shape[-1])
        self.sum_squares += rows.double().square().sum(0)
        self.largest = torch.maximum(self.largest, rows.abs().amax(0).float())
        self.calls += 1
        self.tokens += rows.shape[0]


@contextmanager
def observe(policy: nn.Module, statistics: Mapping[str, SiteStatistics]) -> Iterator[None]:
    """Add every input that reaches a site of ``statistics`` while the block runs."""

    def hook(site: SiteStatistics) -> object:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            site.add_(inputs[0])

        return add

    handles = [
        policy.get_submodule(name).register_forward_pre_hook(hook(site))  # type: ignore[arg-type]
        for name, site in statistics.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def require_finite(statistics: Mapping[str, SiteStatistics], frame: int) -> None:
    """Raise `QuantVLAError` naming the first site whose input was not finite up to ``frame``."""
    for name, site in statistics.items():
        if not bool(torch.isfinite(site.sum_squares).all()):
            raise explain(
                f"{name}, calibration frame {frame}",
                "its input is not finite",
                remedy="remove that frame from the calibration set, or check the checkpoint's weights",
            )


def require_calls(
    statistics: Mapping[str, SiteStatistics], expected: Iterable[tuple[str, int]]
) -> None:
    """Raise `QuantVLAError` unless every site saw exactly the expected number of calls."""
    for name, calls in expected:
        if statistics[name].calls != calls:
            raise explain(
                name,
                f"calibration reached it a wrong number of times, expected {calls}",
                got=statistics[name].calls,
                remedy="this is a defect of the family's stages: report it",
            )
