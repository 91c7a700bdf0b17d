"""A cheap level that answers when it is sure, and a better one that is asked when it is not.

How sure the cheap level is, is read from how far its chunks from different noise lie apart.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.control.counters import CascadeCounts
from quantvla.runtime.errors import explain
from quantvla.runtime.guidance import ActionPrefix
from quantvla.runtime.policy import Policy
from quantvla.runtime.preprocess import Observation

FloatArray = NDArray[np.float32]
_SEED_STEP = 1 << 48
Answer = Literal["cheap", "better", "no time"]
"""Who made a chunk: the cheap level when sure, the better one, the cheap one for want of time."""


@dataclass(frozen=True)
class Level:
    """A policy with a number of denoise steps, None for its own."""

    policy: Policy
    steps: int | None = None


class Cascade:
    """A policy of two levels.

    The cheap level samples ``samples`` chunks of one observation, which share its prefix. When the
    spread of their first ``rows`` rows exceeds ``threshold`` (in units of the training actions'
    normalization, see `spread`) and the better level is expected to be done ``budget_s`` after the
    call, its chunk is returned, else the cheap level's first one. Levels of one policy share the
    prefix too. The expectation is the longest of the better level's last ten runs.

    ``answer`` is who made the last chunk; ``had_time`` replaces the clock's word in a replay.
    """

    def __init__(
        self,
        cheap: Level,
        better: Level,
        *,
        threshold: float,
        rows: int,
        samples: int = 3,
        budget_s: float | None = None,
    ) -> None:
        if samples < 2:
            raise explain("cascade samples", "expected at least 2", got=samples, remedy="change it")
        if cheap.policy.manifest.action != better.policy.manifest.action:
            raise explain(
                "cascade", "the levels make different actions", remedy="use engines of one policy"
            )
        for level in (cheap, better):
            if level.steps is not None:
                level.policy.load_step()
        self.counts = CascadeCounts()
        self.answer: Answer | None = None
        self.had_time: bool | None = None
        self._cheap, self._better = cheap, better
        self._threshold, self._rows, self._samples = threshold, rows, samples
        self._budget_s = budget_s
        self._lasted_s: deque[float] = deque(maxlen=10)

    def predict_action_chunk(
        self,
        obs: Mapping[str, Any],
        /,
        *,
        noise: NDArray[Any] | None = None,
        seed: int | None = None,
        prefix: ActionPrefix | None = None,
    ) -> FloatArray:
        """Return the next (horizon, dim) actions in physical units; ``noise`` is that of the chunk returned."""
        start_s = time.perf_counter()
        self.counts.chunks += 1
        tensors = self._cheap.policy.prepare(obs)
        chunks = self._sample(tensors, noise, seed, prefix)
        self.answer = self._decide(chunks, tensors, start_s)
        if self.answer != "better":
            self.counts.no_time += self.answer == "no time"
            return chunks[0]
        self.counts.escalated += 1
        better, begin_s = self._better, time.perf_counter()
        if better.policy is not self._cheap.policy:
            tensors = better.policy.prepare(obs)
        chunk = better.policy.sample_chunk(
            tensors, noise=noise, seed=seed, prefix=prefix, steps=better.steps
        )
        self._lasted_s.append(time.perf_counter() - begin_s)
        return chunk

    def _sample(
        self,
        tensors: dict[str, NDArray[Any]],
        noise: NDArray[Any] | None,
        seed: int | None,
        prefix: ActionPrefix | None,
    ) -> list[FloatArray]:
        """Return the cheap level's chunks; the first one is from the given noise or seed."""
        policy, steps = self._cheap.policy, self._cheap.steps
        first = policy.sample_chunk(tensors, noise=noise, seed=seed, prefix=prefix, steps=steps)
        others = [
            policy.sample_chunk(
                tensors, seed=(seed or 0) + index * _SEED_STEP, prefix=prefix, steps=steps
            )
            for index in range(1, self._samples)
        ]
        return [first, *others]

    def _decide(
        self, chunks: Sequence[FloatArray], tensors: dict[str, NDArray[Any]], start_s: float
    ) -> Answer:
        if spread(self._cheap.policy, chunks, self._rows, tensors) <= self._threshold:
            return "cheap"
        return "better" if self._has_time(start_s) else "no time"

    def _has_time(self, start_s: float) -> bool:
        if self.had_time is not None:
            return self.had_time
        if self._budget_s is None:
            return True
        expected_s = max(self._lasted_s, default=0.0)
        return time.perf_counter() - start_s + expected_s <= self._budget_s


def spread(
    policy: Policy, chunks: Sequence[FloatArray], rows: int, tensors: dict[str, NDArray[Any]]
) -> float:
    """Return how far chunks of one observation (as prepared: ``tensors``) lie apart: the RMS deviation from their mean over the
    first ``rows`` rows, in normalized units, so that every action dimension counts alike."""
    normalized = np.stack(
        [policy.postprocessor.normalize(chunk[:rows], tensors) for chunk in chunks]
    )
    return float(np.sqrt(np.mean(np.var(normalized, axis=0, ddof=1))))


def calibrate_threshold(
    level: Level, observations: Iterable[Observation], *, rows: int, share: float, samples: int = 3
) -> float:
    """Return the threshold that escalates about ``share`` of observations like the given ones."""
    if not 0 <= share <= 1:
        raise explain("cascade share", "expected 0 to 1", got=share, remedy="change it")
    found = []
    for index, obs in enumerate(observations):
        tensors = level.policy.prepare(obs)
        seeds = [index + k * _SEED_STEP for k in range(samples)]
        chunks = [level.policy.sample_chunk(tensors, seed=s, steps=level.steps) for s in seeds]
        found.append(spread(level.policy, chunks, rows, tensors))
    if not found:
        raise explain("cascade", "no observation to calibrate on", remedy="give a set with frames")
    return float(np.quantile(found, 1.0 - share))
