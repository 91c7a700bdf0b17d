"""Roofline latency of a stage on a board: an estimate from operations and bytes, never a measurement.

A product takes the longer of its arithmetic at the board's peak and its bytes at the board's bandwidth,
both at the share that well-tuned kernels reach; every kernel adds the board's launch time. The two
shares are the same for every board, model and format: they are not fitted per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from quantvla.runtime.targets import FORMAT_BITS, Board

COMPUTE_SHARE, BANDWIDTH_SHARE = 0.5, 0.75
_BLOCK = 32  # int4 weights: one half-precision scale for so many
_ACTIVATION_BYTES = 2


@dataclass(frozen=True)
class Product:
    """``count`` matrix products (tokens, inner) x (inner, outer); ``stored``: the right one is a weight."""

    name: str
    tokens: int
    inner: int
    outer: int
    count: int = 1
    stored: bool = True

    @property
    def operations(self) -> int:
        """Multiplications and additions of all of them."""
        return 2 * self.tokens * self.inner * self.outer * self.count


@dataclass(frozen=True)
class StageWork:
    """What one run of a stage does. ``formats``: of the products, None for the format asked for.

    ``kernels``: launches of one run, products included.
    """

    name: str
    repeat: int
    products: tuple[Product, ...]
    kernels: int
    formats: tuple[str, ...] | None = None


class StageEstimate(msgspec.Struct, frozen=True):
    """Estimated milliseconds of all runs of a stage in a chunk, and what bounds them."""

    stage: str
    runs: int
    compute_ms: float
    memory_ms: float
    launch_ms: float
    total_ms: float
    weight_mb: float
    giga_operations: float

    @property
    def bound(self) -> str:
        """Which of the three is the largest part."""
        parts = {"compute": self.compute_ms, "memory": self.memory_ms, "launches": self.launch_ms}
        return max(parts, key=lambda name: parts[name])


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """An estimate of one action chunk, without preprocessing."""

    what: str
    board: str
    format: str
    activations: str
    stages: tuple[StageEstimate, ...]
    note: str = "estimate: roofline from operations and bytes, not measured"

    @property
    def total_ms(self) -> float:
        """All stages."""
        return sum(stage.total_ms for stage in self.stages)


def estimate(
    what: str,
    works: Sequence[StageWork],
    board: Board,
    number_format: str,
    activations: str = "fp16",
) -> Estimate:
    """Return the estimate of all stages with their stored products in ``number_format``.

    Products of two activations (attention) run in ``activations``. Raises `QuantVLAError` for a
    format the board has no rate for.
    """
    stages = tuple(_stage(work, board, number_format, activations) for work in works)
    return Estimate(
        what=what, board=board.name, format=number_format, activations=activations, stages=stages
    )


def _stage(work: StageWork, board: Board, number_format: str, activations: str) -> StageEstimate:
    compute_s = memory_s = total_s = weights = operations = 0.0
    formats = work.formats or (number_format,) * len(work.products)
    for product, chosen in zip(work.products, formats, strict=True):
        used = chosen if product.stored else activations
        compute = product.operations / (board.peak(used) * COMPUTE_SHARE)
        memory = _bytes(product, used) / (board.bandwidth_gb_s * 1e9 * BANDWIDTH_SHARE)
        weights += _stored_bytes(product, used) if product.stored else 0
        operations += product.operations
        compute_s, memory_s, total_s = (
            compute_s + compute, memory_s + memory, total_s + max(compute, memory),
        )  # fmt: skip
    launch_s = work.kernels * board.launch_us * 1e-6
    scale = 1e3 * work.repeat
    return StageEstimate(
        work.name, work.repeat, round(compute_s * scale, 3), round(memory_s * scale, 3),
        round(launch_s * scale, 3), round((total_s + launch_s) * scale, 3), round(weights / 1e6, 3),
        round(operations * work.repeat / 1e9, 3),
    )  # fmt: skip


def _stored_bytes(product: Product, number_format: str) -> float:
    elements = product.inner * product.outer * product.count
    scales = 16 / _BLOCK if number_format in ("int4", "nvfp4") else 0
    return elements * (FORMAT_BITS[number_format] + scales) / 8


def _bytes(product: Product, number_format: str) -> float:
    """Return the bytes moved: weights once, inputs and outputs in half precision."""
    right = (
        _stored_bytes(product, number_format)
        if product.stored
        else product.inner * product.outer * product.count * _ACTIVATION_BYTES
    )
    sides = product.tokens * (product.inner + product.outer) * product.count
    return right + sides * _ACTIVATION_BYTES
