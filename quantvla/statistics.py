"""What calibration measures at linears and attentions, and how much of it was seen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from quantvla.runtime.errors import QuantVLAError, explain

ROWS = 256  # inputs kept per site, for searches with the real activation quantizer in the loop


@dataclass
class SiteStatistics:
    """Running statistics of one site's input, over all tokens of all calls.

    ``sum_squares`` (in,) float64; ``halves`` (2, in) float32, the largest magnitude per channel in the first and
    in the second half of the calls, whose difference tells how far unseen inputs may go beyond both;
    ``rows`` (at most `ROWS`, in) float32, inputs drawn evenly over the calls, the same in every run.
    """

    sum_squares: Tensor
    halves: Tensor
    rows: Tensor
    calls: int = 0
    tokens: int = 0

    @staticmethod
    def empty(in_features: int) -> SiteStatistics:
        """Return statistics that have seen nothing."""
        return SiteStatistics(
            torch.zeros(in_features, dtype=torch.float64),
            torch.zeros(2, in_features),
            torch.zeros(0, in_features),
        )

    @property
    def second_moment(self) -> Tensor:
        """E[x_k^2] per input channel: (in,) float64."""
        return self.sum_squares / max(self.tokens, 1)

    @property
    def largest(self) -> Tensor:
        """The largest magnitude per input channel: (in,) float32."""
        return self.halves.amax(0)

    def add_(self, x: Tensor, expected_calls: int) -> None:
        """Account for an input of shape (..., in), one of ``expected_calls``."""
        rows = x.detach().reshape(-1, x.shape[-1])
        self.sum_squares += rows.double().square().sum(0)
        half = self.halves[int(2 * self.calls >= expected_calls)]
        torch.maximum(half, rows.abs().amax(0).float(), out=half)
        share = (self.calls + 1) * ROWS // expected_calls - self.calls * ROWS // expected_calls
        if share:
            drawn = np.random.default_rng(self.calls).permutation(len(rows))[:share]
            self.rows = torch.cat((self.rows, rows[torch.from_numpy(np.sort(drawn))].float()))
        self.calls += 1
        self.tokens += rows.shape[0]


@dataclass
class InputMoments:
    """Second moments of one site's input in the student, and of the teacher's with it, over all tokens.

    ``student`` (in, in): sum of w x x^T; ``cross`` (in, in): sum of w t x^T with t the teacher's
    input and w the token's weight, both float64; x is what the kernel makes of the input.
    """

    student: Tensor
    cross: Tensor
    tokens: int = 0

    @staticmethod
    def empty(in_features: int) -> InputMoments:
        """Return moments that have seen nothing."""
        student, cross = torch.zeros(2, in_features, in_features, dtype=torch.float64)
        return InputMoments(student, cross)

    def add_(self, x: Tensor, t: Tensor, weights: Tensor | None = None) -> None:
        """Account for one call's inputs (tokens, in), of student and teacher; weights: (tokens,)."""
        weighted = x if weights is None else x * weights[:, None]
        self.student += x.t() @ weighted
        self.cross += t.t() @ weighted
        self.tokens += x.shape[0]


@dataclass
class _Spread:
    count: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add_(self, values: Tensor) -> None:
        """Account for values of shape (heads, n)."""
        self.count += values.shape[1]
        self.total = self.total + values.double().sum(1)
        self.squares = self.squares + values.double().square().sum(1)

    @property
    def deviation(self) -> Tensor:
        mean = self.total / self.count
        return (self.squares / self.count - mean.square()).clamp_min(0).sqrt()


@dataclass
class LogitSums:
    """Attention logits q k^T / sqrt(d) of one attention in teacher and student, over what its mask lets it see."""

    teacher: _Spread = field(default_factory=_Spread)
    student: _Spread = field(default_factory=_Spread)


@dataclass
class OutputSums:
    """Outputs of one linear in teacher (t) and student (s), sums per channel (out,) float64 over all tokens."""

    tokens: int
    t: Tensor
    s: Tensor
    tt: Tensor
    ss: Tensor
    ts: Tensor

    @staticmethod
    def empty(out_features: int) -> OutputSums:
        """Return sums of nothing."""
        return OutputSums(0, *(torch.zeros(out_features, dtype=torch.float64) for _ in range(5)))

    def add_(self, teacher: Tensor, student: Tensor) -> None:
        """Account for one call's outputs (tokens, out)."""
        t, s = teacher.double(), student.double()
        self.tokens += len(t)
        self.t += t.sum(0)
        self.s += s.sum(0)
        self.tt += t.square().sum(0)
        self.ss += s.square().sum(0)
        self.ts += (t * s).sum(0)


@contextmanager
def observe(
    policy: nn.Module, statistics: Mapping[str, SiteStatistics], expected_calls: Mapping[str, int]
) -> Iterator[None]:
    """Add every input that reaches a site of ``statistics`` while the block runs."""

    def hook(site: SiteStatistics, calls: int) -> object:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            site.add_(inputs[0], calls)

        return add

    handles = [
        policy.get_submodule(name).register_forward_pre_hook(hook(site, expected_calls[name]))  # type: ignore[arg-type]
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
            raise not_finite(name, frame)


def not_finite(site: str, frame: int) -> QuantVLAError:
    """Return the error for a site whose input is not finite on a calibration frame."""
    return explain(
        f"{site}, calibration frame {frame}",
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
