"""When a new chunk is computed and how it takes over from the old one: policies that wrap a policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.control.plan import Plan
from quantvla.runtime.errors import explain
from quantvla.runtime.preprocess import Observation

FloatArray = NDArray[np.float32]


class ChunkPolicy(Protocol):
    """What a strategy wraps: `quantvla.runtime.policy.Policy`, a cascade, or a client of a server."""

    def predict_action_chunk(
        self, obs: Mapping[str, Any], /, *, seed: int | None = None
    ) -> FloatArray:
        """Return the next (horizon, dim) actions in physical units."""
        ...


@dataclass(frozen=True)
class Request:
    """One chunk to compute. Its row 0 is for ``tick``.

    ``ahead``: (n, dim), what the present plan holds from ``tick`` on; ``delay_ticks``: how many of
    those will be run before the chunk is expected; ``seed`` of the flow noise.
    """

    index: int
    observation: Observation
    tick: int
    ahead: FloatArray
    delay_ticks: int
    seed: int


class Strategy(Protocol):
    """Wraps a policy. ``predict`` runs in the inference thread; the others are quick and pure."""

    def wants(self, plan: Plan, tick: int, delay_ticks: int) -> bool:
        """Return whether a chunk is to be computed whose row 0 is for ``tick``."""
        ...

    def predict(self, request: Request) -> FloatArray:
        """Return the chunk (horizon, dim)."""
        ...

    def merge(self, plan: Plan, chunk: FloatArray, requested: int, tick: int) -> Plan | None:
        """Return the plan from ``tick`` on, now that the chunk asked for at ``requested`` is there.

        None if the chunk comes too late to be of use.
        """
        ...


@dataclass(frozen=True)
class Synchronous:
    """Runs ``execute`` actions, then lets the robot wait for the next chunk.

    Nothing overlaps, so nothing is planned from an old observation; the robot halts for every inference.
    """

    policy: ChunkPolicy
    execute: int

    def wants(self, plan: Plan, tick: int, delay_ticks: int) -> bool:
        """Only when the plan is used up."""
        return plan.remaining(tick) == 0

    def predict(self, request: Request) -> FloatArray:
        """Return the wrapped policy's chunk."""
        return self.policy.predict_action_chunk(request.observation, seed=request.seed)

    def merge(self, plan: Plan, chunk: FloatArray, requested: int, tick: int) -> Plan | None:
        """Begin the chunk now, whenever it was asked for: the robot stood still since."""
        return Plan(tick, chunk[: self.execute])


@dataclass(frozen=True)
class Asynchronous:
    """Computes the next chunk while the robot runs the old one, and switches when it is there.

    An inference starts every ``execute`` ticks, or as soon as the one before has ended. Rows whose
    ticks passed during the inference are dropped. The switch can jump: the chunks need not agree.
    """

    policy: ChunkPolicy
    execute: int

    def wants(self, plan: Plan, tick: int, delay_ticks: int) -> bool:
        """When ``execute`` ticks have passed since the present chunk's row 0, or earlier lest it run out."""
        passed = tick - plan.start
        return passed >= min(self.execute, len(plan.actions) - delay_ticks)

    def predict(self, request: Request) -> FloatArray:
        """Return the wrapped policy's chunk."""
        return self.policy.predict_action_chunk(request.observation, seed=request.seed)

    def merge(self, plan: Plan, chunk: FloatArray, requested: int, tick: int) -> Plan | None:
        """Switch to the chunk at the row of the present tick."""
        return Plan(requested, chunk) if tick < requested + len(chunk) else None


@dataclass(frozen=True)
class Blending(Asynchronous):
    """Asynchronous, and for ``blend`` ticks after the switch the mean of both chunks, sliding from old to new.

    The old chunk's influence ends at the latest where it ends.
    """

    blend: int = 4

    def merge(self, plan: Plan, chunk: FloatArray, requested: int, tick: int) -> Plan | None:
        """Slide from the old plan to the chunk, from the present tick on."""
        new = super().merge(plan, chunk, requested, tick)
        if new is None:
            return None
        old = plan.ahead(tick)
        first = tick - requested
        rows = min(self.blend, len(old), len(chunk) - first)
        share = (np.arange(1, rows + 1, dtype=np.float32) / np.float32(rows + 1))[:, None]
        actions = chunk.copy()
        actions[first : first + rows] = (1 - share) * old[:rows] + share * actions[
            first : first + rows
        ]
        return Plan(requested, actions)


def check_execute(execute: int, horizon: int) -> int:
    """Return ``execute``; raises `QuantVLAError` unless it is 1 to the chunk's length."""
    if not 1 <= execute <= horizon:
        raise explain(
            "strategy execute",
            f"expected 1 to {horizon} actions of a chunk",
            got=execute,
            remedy="choose a number in that range",
        )
    return execute
