"""Rotary position embeddings as one operator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from quantvla.export.rewrites.graph import CONTRIB, Editor, commuted, made_by, shape_of
from quantvla.export.rewrites.views import View, arrange, view_of

OPERATOR = "RotaryEmbedding"
_ARITHMETIC = frozenset({"Add", "Sub"})


@dataclass(frozen=True)
class Rotation:
    """``x`` (1, tokens, heads, dim), split in halves a and b, becomes [a cos - b sin, b cos + a sin].

    ``cos`` and ``sin`` (1, tokens, 1, dim / 2). ``view``: how the concatenation shows the first half.
    """

    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    view: View


def fuse_rotary_(model: ir.Model) -> int:
    """Replace rotations of half against half, concatenated, by ``com.microsoft.RotaryEmbedding``."""
    changed = 0
    for node in list(model.graph):
        if node.op_type != "Concat" or len(node.inputs) != 2:
            continue
        rotation = _rotation(node)
        if rotation is None:
            continue
        editor = Editor(model, node)
        editor.substitute(node.outputs[0], _emit(editor, rotation, node))
        changed += 1
    return changed


def _rotation(node: ir.Node) -> Rotation | None:
    views = [view_of(part, until=_ARITHMETIC) for part in node.inputs if part is not None]
    if len(views) != 2 or views[0] is None or views[1] is None or views[0].axes != views[1].axes:
        return None
    first, second = views[0], views[1]
    minus, plus = made_by(first.source, "Sub"), made_by(second.source, "Add")
    if minus is None or plus is None or first.repeated:
        return None
    a_cos, b_sin = made_by(minus.inputs[0], "Mul"), made_by(minus.inputs[1], "Mul")
    if a_cos is None or b_sin is None:
        return None
    for a, cos in commuted(a_cos):
        split = made_by(a, "Split")
        if split is None or a is not split.outputs[0] or len(split.outputs) != 2:
            continue
        b = split.outputs[1]
        sin = next((other for value, other in commuted(b_sin) if value is b), None)
        if cos is None or sin is None or not _is_sum(plus, (b, cos), (a, sin)):
            continue
        x = split.inputs[0]
        if x is not None and _fits(x, split, cos, sin) and _joins_halves(node, first):
            return Rotation(x, cos, sin, first)
    return None


def _is_sum(node: ir.Node, *products: tuple[ir.Value, ir.Value]) -> bool:
    """Whether a node adds these two products."""
    found = [made_by(value, "Mul") for value in node.inputs]
    if any(product is None for product in found):
        return False
    terms = [{id(value) for value in product.inputs} for product in found if product is not None]
    wanted = [{id(value) for value in product} for product in products]
    return terms in (wanted, wanted[::-1])


def _fits(x: ir.Value, split: ir.Node, cos: ir.Value, sin: ir.Value) -> bool:
    shape = shape_of(x)
    if shape is None or len(shape) != 4 or shape[0] != 1 or shape[3] % 2:
        return False
    axis = split.attributes["axis"].as_int() if "axis" in split.attributes else 0
    table = (1, shape[1], 1, shape[3] // 2)
    halves = all(shape_of(half) == (*shape[:3], shape[3] // 2) for half in split.outputs)
    return halves and axis in (3, -1) and shape_of(cos) == table and shape_of(sin) == table


def _joins_halves(node: ir.Node, view: View) -> bool:
    """Whether the concatenated axis is the one that was split, and holds nothing else."""
    shape = shape_of(node.outputs[0])
    if shape is None:
        return False
    axis = node.attributes["axis"].as_int() % len(shape)
    return view.axes[3] != () and view.axes[3] == view.viewed[axis]


def _emit(editor: Editor, rotation: Rotation, node: ir.Node) -> ir.Value:
    shape = shape_of(rotation.x)
    assert shape is not None
    _, tokens, heads, dim = shape
    positions = editor.constant(f"positions.{tokens}", np.arange(tokens, dtype=np.int64)[None])
    tables = [editor.reshape(table, (tokens, dim // 2)) for table in (rotation.cos, rotation.sin)]
    rotated = editor.add(
        OPERATOR, [editor.reshape(rotation.x, (1, tokens, heads * dim)), positions, *tables],
        shape=(1, tokens, heads * dim), domain=CONTRIB, num_heads=heads, interleaved=0,
    )  # fmt: skip
    whole = editor.reshape(rotated, shape)
    # The halves' layout, with the whole in the place of a half: the factor of the split axis doubles.
    view = rotation.view
    factor = view.axes[3][0]
    sizes = list(view.sizes)
    sizes[factor] *= 2
    doubled = View(source=whole, axes=view.axes, viewed=view.viewed, sizes=tuple(sizes))
    return arrange(editor, doubled, view.viewed)
