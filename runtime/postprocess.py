"""Model output -> actions in physical units, by executing a manifest's steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.errors import explain
from quantvla.runtime.normalize import make_normalizer
from quantvla.runtime.processing_steps import (
    AddState,
    FeatureStatistics,
    PostprocessStep,
    Unnormalize,
)


class Postprocessor:
    """Turns a model output into actions in physical units with a manifest's postprocessing steps.

    One unnormalize step, then add_state steps for actions that are relative to the state. Those
    need ``tensors``, what preprocessing made of the actions' observation.
    """

    def __init__(
        self, steps: Sequence[PostprocessStep], statistics: Mapping[str, FeatureStatistics]
    ) -> None:
        step = steps[0] if steps else None
        rest = [later for later in steps[1:] if isinstance(later, AddState)]
        if not isinstance(step, Unnormalize) or len(rest) != len(steps) - 1:
            raise explain(
                "postprocessing",
                "expected one unnormalize step, then only add_state steps",
                got=[type(step).__name__ for step in steps],
                remedy="export the engine again",
            )
        self._added = rest
        self._dim, self._horizon, self._clip = step.dim, step.horizon, step.clip
        self._normalizer = make_normalizer(step.key, step.mode, step.eps, statistics.get(step.key))
        if self._normalizer.dim not in (None, step.dim):
            raise explain(
                f"statistics of {step.key!r}",
                f"expected {step.dim} entries",
                got=self._normalizer.dim,
                remedy="export the engine again",
            )

    def __call__(
        self,
        output: NDArray[np.float32],
        tensors: Mapping[str, NDArray[Any]] = MappingProxyType({}),
    ) -> NDArray[np.float32]:
        """output: (1, horizon, padded) normalized -> (horizon, dim) float32, physical units."""
        kept = output[0, : self._horizon, : self._dim]
        if self._clip:
            kept = kept.clip(-1, 1)
        actions = self._normalizer.unnormalize(kept)
        return actions + self._origin(tensors) if self._added else actions

    def normalize(
        self,
        actions: NDArray[np.float32],
        tensors: Mapping[str, NDArray[Any]] = MappingProxyType({}),
    ) -> NDArray[np.float32]:
        """actions: (n, dim) physical units -> (n, dim) normalized: the inverse of a call."""
        if actions.ndim != 2 or actions.shape[1] != self._dim:
            raise explain(
                "actions",
                f"expected rows of {self._dim} numbers",
                got=f"shape {actions.shape}",
                remedy="pass actions as the policy returned them",
            )
        actions = actions.astype(np.float32)
        return self._normalizer.normalize(
            actions - self._origin(tensors) if self._added else actions
        )

    def _origin(self, tensors: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Return what relative actions are relative to: (dim,)."""
        origin = np.zeros(self._dim, np.float32)
        for step in self._added:
            if step.tensor not in tensors:
                raise explain(
                    "actions",
                    f"are relative to the state, and {step.tensor!r} of their observation is not given",
                    remedy="pass the tensors that Policy.prepare returned",
                )
            mask = np.array(step.mask)
            origin[: len(mask)] += tensors[step.tensor][0, : len(mask)] * mask
        return origin
