"""Which elements of which tensor a chain of Transpose, Reshape, Unsqueeze and Expand shows, and in what order.

The axes of a tensor are written as products of factors (as einops does). Walking back from a
tensor through layout nodes keeps, for the tensor reached, the factors each of its axes is made of;
a factor that an Expand repeats stands on no axis of the source. However an exporter wrote the
layout, the result is the same, so the rewrites need no pattern per spelling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import onnx_ir as ir

from quantvla.export.rewrites.graph import Editor, made_by, scalar, shape_of

Axes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class View:
    """``source`` holds the viewed tensor's elements.

    ``axes``: factors of each axis of ``source``; ``viewed``: factors of each axis of the tensor the
    walk began at, ``repeated`` factors included; ``sizes``: size of each factor; ``scale``: scalars
    multiplied along the way.
    """

    source: ir.Value
    axes: Axes
    viewed: Axes
    sizes: tuple[int, ...]
    repeated: frozenset[int] = frozenset()
    scale: float = 1.0

    def size(self, factors: tuple[int, ...]) -> int:
        """Return the product of some factors' sizes."""
        return math.prod(self.sizes[factor] for factor in factors)


def view_of(
    value: ir.Value, *, scales: bool = False, until: frozenset[str] = frozenset()
) -> View | None:
    """Return the view that ``value`` is of the first tensor that no layout node makes.

    ``scales``: also walk through multiplication by a scalar. None if a shape is not known.
    """
    shape = shape_of(value)
    if shape is None:
        return None
    factors = tuple((axis,) if size != 1 else () for axis, size in enumerate(shape))
    view = View(source=value, axes=factors, viewed=factors, sizes=shape)
    while True:
        earlier = _step(view, scales, until)
        if earlier is None:
            return view
        view = earlier


def _step(view: View, scales: bool, until: frozenset[str]) -> View | None:
    """Return the view of what the source's own node reads, or None if it is no layout node."""
    node = view.source.producer()
    if node is None or node.op_type in until or not node.inputs:
        return None
    source = node.inputs[0]
    shape = shape_of(source)
    if source is None or shape is None:
        return None
    if node.op_type == "Transpose":
        permutation = node.attributes["perm"].as_ints()
        axes: list[tuple[int, ...]] = [()] * len(permutation)
        for out, axis in enumerate(permutation):
            axes[axis] = view.axes[out]
        return replace(view, source=source, axes=tuple(axes))
    if node.op_type in ("Reshape", "Unsqueeze", "Squeeze", "Flatten"):
        return _regroup(replace(view, source=source), shape)
    if node.op_type == "Expand":
        return _collapse(view, source, shape)
    if node.op_type == "Mul" and scales:
        for index in (0, 1):
            factor, other = scalar(node.inputs[index]), node.inputs[1 - index]
            if (
                factor is not None
                and other is not None
                and shape_of(other) == shape_of(view.source)
            ):
                return replace(view, source=other, scale=view.scale * factor)
    return None


def _regroup(view: View, shape: tuple[int, ...]) -> View | None:
    """Return the view with its factors, in the same order, on axes of these sizes."""
    flat = [factor for axis in view.axes for factor in axis]
    axes: list[tuple[int, ...]] = []
    for size in shape:
        axis: list[int] = []
        left = size
        while left > 1:
            if not flat:
                return None
            factor = flat[0]
            if left % view.sizes[factor] == 0:
                axis.append(flat.pop(0))
                left //= view.sizes[factor]
            elif view.sizes[factor] % left == 0:
                view, new = _split(view, factor, left)
                flat[:1] = list(new)
            else:
                return None
        axes.append(tuple(axis))
    return None if flat else replace(view, axes=tuple(axes))


def _split(view: View, factor: int, outer: int) -> tuple[View, tuple[int, int]]:
    """Return the view with one factor written as two: ``outer`` times the rest."""
    first, second = len(view.sizes), len(view.sizes) + 1
    sizes = (*view.sizes, outer, view.sizes[factor] // outer)

    def rename(axes: Axes) -> Axes:
        return tuple(
            tuple(new for old in axis for new in ((first, second) if old == factor else (old,)))
            for axis in axes
        )

    repeated = view.repeated
    if factor in repeated:
        repeated = repeated | {first, second}
    return replace(
        view, axes=rename(view.axes), viewed=rename(view.viewed), sizes=sizes, repeated=repeated
    ), (first, second)


def _collapse(view: View, source: ir.Value, shape: tuple[int, ...]) -> View | None:
    """Return the view without the factors that an Expand from ``shape`` repeats."""
    out = shape_of(view.source)
    assert out is not None
    padded = (1,) * (len(out) - len(shape)) + shape
    axes, repeated = [], set(view.repeated)
    for axis, before, after in zip(view.axes, padded, out, strict=True):
        if before == after:
            axes.append(axis)
        else:
            repeated |= set(axis)
            axes.append(())
    lead = len(out) - len(shape)
    return replace(view, source=source, axes=tuple(axes[lead:]), repeated=frozenset(repeated))


def arrange(editor: Editor, view: View, target: Axes) -> ir.Value:
    """Return the viewed elements on the axes ``target``, with as few nodes as possible.

    ``target`` names every factor of the source once.
    """
    flat = tuple(factor for axis in view.axes for factor in axis)
    order = tuple(factor for axis in target for factor in axis)
    if sorted(flat) != sorted(order):
        raise ValueError(f"{view.source.name}: {order} does not cover the factors {flat}")
    shape = tuple(view.size(axis) for axis in target)
    value = view.source
    if flat != order:
        runs = _runs(flat, order)
        value = editor.reshape(value, [view.size(run) for run in runs])
        starts = sorted(range(len(runs)), key=lambda index: order.index(runs[index][0]))
        value = editor.transpose(value, starts)
    return editor.reshape(value, shape)


def _runs(flat: tuple[int, ...], order: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return ``flat`` cut into the pieces that stay together in ``order``."""
    runs: list[tuple[int, ...]] = []
    for factor in flat:
        if runs and order.index(factor) == order.index(runs[-1][-1]) + 1:
            runs[-1] = (*runs[-1], factor)
        else:
            runs.append((factor,))
    return runs


def layout_node(value: ir.Value | None) -> ir.Node | None:
    """Return the layout node that makes a value, or None."""
    return made_by(value, "Transpose", "Reshape", "Unsqueeze", "Squeeze", "Expand", "Flatten")
