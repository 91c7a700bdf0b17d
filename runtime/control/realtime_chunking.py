"""Real-time chunking (arXiv 2506.07339): asynchronous, and the new chunk is sampled to continue the old one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.control.strategy import Asynchronous, Request
from quantvla.runtime.guidance import ActionPrefix, Method, Schedule

FloatArray = NDArray[np.float32]


class PrefixPolicy(Protocol):
    """A policy that can be told what its chunk must begin with."""

    def predict_action_chunk(
        self,
        obs: Mapping[str, Any],
        /,
        *,
        noise: NDArray[Any] | None = None,
        seed: int | None = None,
        prefix: ActionPrefix | None = None,
    ) -> FloatArray:
        """Return the next (horizon, dim) actions in physical units."""
        ...


@dataclass(frozen=True)
class RealTimeChunking(Asynchronous):
    """Asynchronous chunks that agree with what the robot runs meanwhile.

    ``method``, ``schedule``, ``overlap`` and ``max_weight`` are those of `ActionPrefix`; ``vjp``
    needs ``policy.load_guidance()`` before the loop starts.
    """

    policy: PrefixPolicy
    method: Method = "prefix"
    schedule: Schedule = "exponential"
    overlap: int | None = None
    max_weight: float = 10.0

    def predict(self, request: Request) -> FloatArray:
        """Return a chunk that continues the request's plan."""
        return self.predict_action_chunk(
            request.observation,
            inference_delay=request.delay_ticks,
            prev_chunk_left_over=request.ahead,
            seed=request.seed,
        )

    def predict_action_chunk(
        self,
        obs: Mapping[str, Any],
        *,
        inference_delay: int = 0,
        prev_chunk_left_over: FloatArray | None = None,
        noise: NDArray[Any] | None = None,
        seed: int | None = None,
    ) -> FloatArray:
        """Return the next (horizon, dim) actions in physical units.

        prev_chunk_left_over: (n, dim) physical units, the old chunk's actions from this chunk's row
        0 on; the first ``inference_delay`` of them will have been run when this chunk is there.
        """
        prefix = None
        if prev_chunk_left_over is not None and len(prev_chunk_left_over):
            prefix = ActionPrefix(
                prev_chunk_left_over,
                inference_delay,
                self.overlap,
                self.schedule,
                self.method,
                self.max_weight,
            )
        return self.policy.predict_action_chunk(obs, noise=noise, seed=seed, prefix=prefix)
