"""Attention as one operator, however the exporter spelled it.

Recognized: ``softmax(scale * q k^T [masked]) v`` over four axes, with the scale at the queries, keys
or scores, the mask as ``Where`` or ``Add``, and shared key heads repeated by any chain of layout
nodes. Heads that share keys are stacked as more queries of the shared head, which is the same
arithmetic without repeating keys and values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from quantvla.export.rewrites.graph import CONTRIB, Editor, made_by, scalar, shape_of
from quantvla.export.rewrites.views import View, arrange, view_of

OPERATOR = "MultiHeadAttention"


@dataclass(frozen=True)
class Attention:
    """One attention. Views of q (batch, heads, queries, dim), k (batch, heads, dim, keys), v (batch, heads, keys, dim).

    ``mask``: boolean (..., queries, keys), true where attended; ``bias``: added to the scores;
    ``fill``: the score of what is masked. ``shared``: query heads per key head.
    """

    q: View
    k: View
    v: View
    scale: float
    mask: ir.Value | None
    bias: ir.Value | None
    fill: float
    shared: int
    last: ir.Node


def fuse_attention_(model: ir.Model) -> int:
    """Replace every recognized attention by ``com.microsoft.MultiHeadAttention``; returns how many."""
    changed = 0
    for node in list(model.graph):
        found = recognize(node) if node.op_type == "Softmax" else None
        if found is None or not supported(found):
            continue
        editor = Editor(model, found.last)
        result = _emit_shared(editor, found) if found.shared > 1 else _emit(editor, found)
        editor.substitute(found.last.outputs[0], result)
        changed += 1
    return changed


def recognize(softmax: ir.Node) -> Attention | None:
    """Return the attention a softmax is part of, or None."""
    shape = shape_of(softmax.outputs[0])
    axis = softmax.attributes["axis"].as_int() if "axis" in softmax.attributes else -1
    users = softmax.outputs[0].consumers()
    if shape is None or len(shape) != 4 or axis not in (3, -1) or len(users) != 1:
        return None
    last = users[0]
    if last.op_type != "MatMul" or last.inputs[0] is not softmax.outputs[0]:
        return None
    masked = _unmask(softmax.inputs[0])
    if masked is None:
        return None
    scores, mask, bias, fill = masked
    scores, scale = _unscale(scores)
    product = made_by(scores, "MatMul")
    if product is None or product.inputs[0] is None or product.inputs[1] is None:
        return None
    assert last.inputs[1] is not None
    q = view_of(product.inputs[0], scales=True)
    k, v = view_of(product.inputs[1], scales=True), view_of(last.inputs[1])
    if q is None or k is None or v is None or q.repeated:
        return None
    shared = _shared(k, 1)
    if shared is None or shared != _shared(v, 1) or (shared > 1 and shape[0] != 1):
        return None
    return Attention(q, k, v, scale * q.scale * k.scale, mask, bias, fill, shared, last)


def _unmask(
    value: ir.Value | None,
) -> tuple[ir.Value | None, ir.Value | None, ir.Value | None, float] | None:
    """Return the scores below a mask, the mask, the bias and the fill."""
    where, add = made_by(value, "Where"), made_by(value, "Add")
    if where is not None:
        fill = scalar(where.inputs[2])
        if fill is None or fill > -1e30:
            return None
        return where.inputs[1], where.inputs[0], None, fill
    if add is not None:
        for index in (0, 1):
            scores = add.inputs[1 - index]
            if made_by(_unscale(scores)[0], "MatMul") and shape_of(scores) == shape_of(value):
                return scores, None, add.inputs[index], 0.0
        return None
    return value, None, None, 0.0


def _unscale(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    scale = 1.0
    while (node := made_by(value, "Mul", "Div")) is not None:
        factor = scalar(node.inputs[1])
        if factor is None:
            break
        scale = scale * factor if node.op_type == "Mul" else scale / factor
        value = node.inputs[0]
    return value, scale


def _shared(view: View, heads: int) -> int | None:
    """Return how often each head is repeated, if the repeated factors are the inner ones of the head axis."""
    axis = view.viewed[heads]
    repeated = [factor in view.repeated for factor in axis]
    if any(
        factor in view.repeated for other in view.viewed if other is not axis for factor in other
    ):
        return None
    if repeated != sorted(repeated):
        return None
    return math.prod(view.sizes[f] for f in axis if f in view.repeated)


def _kept(view: View, axis: int) -> tuple[int, ...]:
    return tuple(factor for factor in view.viewed[axis] if factor not in view.repeated)


def _emit(editor: Editor, found: Attention) -> ir.Value:
    """Every query head has its own keys: operands (batch, tokens, heads * dim)."""
    batch, heads, queries, _ = (found.q.size(axis) for axis in found.q.viewed)
    b, h, s, d = found.q.viewed
    q = arrange(editor, found.q, (b, s, (*h, *d)))
    b, h, d, t = found.k.viewed
    k = arrange(editor, found.k, (b, t, (*h, *d)))
    b, h, t, d = found.v.viewed
    v = arrange(editor, found.v, (b, t, (*h, *d)))
    width = found.v.size(d)
    out = editor.add(
        OPERATOR, [q, k, v, None, None, _bias(editor, found)],
        shape=(batch, queries, heads * width), domain=CONTRIB, num_heads=heads, scale=found.scale,
    )  # fmt: skip
    out = editor.reshape(out, (batch, queries, heads, width))
    return editor.transpose(out, (0, 2, 1, 3))


def _emit_shared(editor: Editor, found: Attention) -> ir.Value:
    """One key head per group: groups are the batch, the group's heads are more queries."""
    _, heads, queries, dim = (found.q.size(axis) for axis in found.q.viewed)
    groups = heads // found.shared
    rows = found.shared * queries
    q = editor.reshape(arrange(editor, found.q, found.q.viewed), (groups, rows, dim))
    k = arrange(editor, found.k, (_kept(found.k, 1), found.k.viewed[3], found.k.viewed[2]))
    v = arrange(editor, found.v, (_kept(found.v, 1), found.v.viewed[2], found.v.viewed[3]))
    width = found.v.size(found.v.viewed[3])
    bias = _bias(editor, found)
    if bias is not None:
        shape = shape_of(bias)
        assert shape is not None
        repeat = editor.constant(
            f"shape.1x{found.shared}x{queries}x{shape[3]}",
            np.array([1, found.shared, queries, shape[3]], dtype=np.int64),
        )
        bias = editor.add("Expand", [bias, repeat], shape=(1, found.shared, queries, shape[3]))
        bias = editor.reshape(bias, (1, 1, rows, shape[3]))
    out = editor.add(
        OPERATOR, [q, k, v, None, None, bias],
        shape=(groups, rows, width), domain=CONTRIB, num_heads=1, scale=found.scale,
    )  # fmt: skip
    return editor.reshape(out, (1, heads, queries, width))


def _bias(editor: Editor, found: Attention) -> ir.Value | None:
    """Return what is added to the scores, (1 or batch, 1 or heads, queries, keys), or None."""
    value = found.bias if found.mask is None else found.mask
    if value is None:
        return None
    shape = shape_of(value)
    assert shape is not None
    value = editor.reshape(value, (*(1,) * (4 - len(shape)), *shape))
    if found.mask is None:
        return value
    zero = editor.constant("attended", np.zeros((), np.float32))
    fill = editor.constant("masked", np.array(found.fill, np.float32))
    return editor.add("Where", [value, zero, fill], shape=shape_of(value))


def supported(found: Attention) -> bool:
    """Whether the operator can take the mask: whole rows of queries and keys, the same for all heads if shared."""
    value = found.bias if found.mask is None else found.mask
    if value is None:
        return True
    shape = shape_of(value)
    queries, keys = found.q.size(found.q.viewed[2]), found.k.size(found.k.viewed[3])
    if shape is None or shape[-2:] != (queries, keys):
        return False
    return found.shared == 1 or math.prod(shape[:-2]) == 1
