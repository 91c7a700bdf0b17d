"""A chunk strategy as data: in a run file, and in the head of a trace."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from quantvla.runtime.control.realtime_chunking import RealTimeChunking
from quantvla.runtime.control.strategy import (
    Asynchronous,
    Blending,
    Strategy,
    Synchronous,
    check_execute,
)
from quantvla.runtime.guidance import Method, Schedule
from quantvla.runtime.policy import Policy

StrategyKind = Literal["sync", "async", "blend", "rtc"]
STRATEGIES: tuple[StrategyKind, ...] = ("sync", "async", "blend", "rtc")
PositiveInt = Annotated[int, msgspec.Meta(gt=0)]


class StrategySpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which strategy. ``execute`` None: the policy's own number of actions of a chunk.

    ``blend`` is for ``blend``; ``guidance``, ``schedule``, ``overlap`` and ``max_weight`` are for ``rtc``.
    """

    kind: StrategyKind = "rtc"
    execute: PositiveInt | None = None
    blend: PositiveInt = 4
    guidance: Method = "prefix"
    schedule: Schedule = "exponential"
    overlap: PositiveInt | None = None
    max_weight: float = 10.0


def build_strategy(spec: StrategySpec, policy: Policy) -> Strategy:
    """Return the strategy around ``policy``; raises `QuantVLAError` if the policy cannot do it."""
    action = policy.manifest.action
    execute = check_execute(spec.execute or action.execute, action.horizon)
    if spec.kind == "sync":
        return Synchronous(policy, execute)
    if spec.kind == "async":
        return Asynchronous(policy, execute)
    if spec.kind == "blend":
        return Blending(policy, execute, spec.blend)
    if spec.guidance == "vjp":
        policy.load_guidance()
    return RealTimeChunking(
        policy, execute, spec.guidance, spec.schedule, spec.overlap, spec.max_weight
    )
