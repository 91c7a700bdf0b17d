"""A chunk strategy as data: in a run file, and in the head of a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from quantvla.runtime.control.cascade import Cascade, Level
from quantvla.runtime.control.realtime_chunking import PrefixPolicy, RealTimeChunking
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
_FOR_KIND: dict[str, StrategyKind] = {
    "blend": "blend", "guidance": "rtc", "schedule": "rtc", "overlap": "rtc", "max_weight": "rtc",
}  # fmt: skip
PositiveInt = Annotated[int, msgspec.Meta(gt=0)]


class CascadeSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A cheap level with ``steps`` denoise steps, and a better one: another ``engine``, or more steps.

    ``threshold`` is what `quantvla.runtime.control.cascade.calibrate_threshold` gives; the better
    level must be done ``budget_ms`` after the chunk was asked for.
    """

    threshold: float
    steps: PositiveInt | None = None
    engine: Path | None = None
    better_steps: PositiveInt | None = None
    samples: Annotated[int, msgspec.Meta(ge=2)] = 3
    budget_ms: Annotated[float, msgspec.Meta(gt=0)] | None = None


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

    def __post_init__(self) -> None:
        """Raise ValueError for an option that the kind would ignore."""
        defaults = dict(zip(self.__struct_fields__, self.__struct_defaults__, strict=True))
        for name, kind in _FOR_KIND.items():
            if self.kind != kind and getattr(self, name) != defaults[name]:
                raise ValueError(f"`{name}` is for kind '{kind}', not '{self.kind}'")


def build_strategy(
    spec: StrategySpec, policy: Policy, chunks: PrefixPolicy | None = None
) -> Strategy:
    """Return the strategy around ``policy``, or around ``chunks`` where something else answers for it.

    Raises `QuantVLAError` if the policy cannot do it.
    """
    action = policy.manifest.action
    execute = check_execute(spec.execute or action.execute, action.horizon)
    inner: PrefixPolicy = policy if chunks is None else chunks
    if spec.kind == "sync":
        return Synchronous(inner, execute)
    if spec.kind == "async":
        return Asynchronous(inner, execute)
    if spec.kind == "blend":
        return Blending(inner, execute, spec.blend)
    if spec.guidance == "vjp":
        policy.load_guidance()
    else:
        policy.load_step()
    return RealTimeChunking(
        inner, execute, spec.guidance, spec.schedule, spec.overlap, spec.max_weight
    )


@contextmanager
def opened_cascade(
    spec: CascadeSpec, strategy: StrategySpec, policy: Policy, *, warm_up: int = 0
) -> Iterator[Cascade]:
    """Yield the cascade of ``policy`` and its better level, the same engine or another, which is closed at the end."""
    with ExitStack() as stack:
        better = policy
        if spec.engine is not None:
            better = stack.enter_context(
                Policy.from_pretrained(spec.engine, threads=policy.threads)
            )
            better.warm_up(warm_up)
        yield build_cascade(
            spec, policy, better, strategy.execute or policy.manifest.action.execute
        )


def build_cascade(spec: CascadeSpec, policy: Policy, better: Policy, rows: int) -> Cascade:
    """Return the cascade of ``policy`` and ``better`` (the same one for more steps)."""
    return Cascade(
        Level(policy, spec.steps),
        Level(better, spec.better_steps),
        threshold=spec.threshold,
        rows=rows,
        samples=spec.samples,
        budget_s=None if spec.budget_ms is None else spec.budget_ms / 1e3,
    )
