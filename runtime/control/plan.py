"""Which action is meant for which tick."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Plan:
    """Row i of ``actions`` (n, dim) is for tick ``start + i``. Rows of the past are kept: they say how old it is."""

    start: int
    actions: FloatArray

    @property
    def end(self) -> int:
        """The first tick after the plan."""
        return self.start + len(self.actions)

    def at(self, tick: int) -> FloatArray | None:
        """Return the action (dim,) of a tick, None where the plan has none."""
        return self.actions[tick - self.start] if self.start <= tick < self.end else None

    def ahead(self, tick: int) -> FloatArray:
        """Return the actions (n, dim) from ``tick`` on."""
        return self.actions[max(tick - self.start, 0) :]

    def remaining(self, tick: int) -> int:
        """Return how many actions there are from ``tick`` on."""
        return max(self.end - max(tick, self.start), 0)


def empty_plan(dim: int = 0) -> Plan:
    """Return the plan before the first chunk."""
    return Plan(0, np.zeros((0, dim), dtype=np.float32))
