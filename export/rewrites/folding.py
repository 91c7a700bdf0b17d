"""What is known before the graph runs: constant subgraphs, masks that mask nothing, neutral elements."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnxscript.optimizer import fold_constants

from quantvla.export.rewrites.graph import ELEMENTWISE, Editor, constant, made_by, scalar, shape_of

_LARGEST_FOLDED = 1 << 22  # elements; masks of a vision tower are this large, and vanish afterwards
_NEUTRAL = {"Add": 0.0, "Sub": 0.0, "Mul": 1.0, "Div": 1.0}
_INTEGER_KERNELS = frozenset({"MatMulNBits", "MatMulInteger", "DequantizeLinear", "QuantizeLinear"})


def fold_constants_(model: ir.Model) -> int:
    """Compute what depends on constants only; returns how many nodes that removes.

    Weights keep their stored form: nothing that reads one of an integer kernel's is folded.
    """
    before = len(model.graph)
    fold_constants(
        model, input_size_limit=_LARGEST_FOLDED, output_size_limit=_LARGEST_FOLDED,
        should_fold=lambda node: None if not _feeds_kernel(node) else False,
    )  # fmt: skip
    return before - len(model.graph)


def _feeds_kernel(node: ir.Node) -> bool:
    return any(
        user.op_type in _INTEGER_KERNELS for output in node.outputs for user in output.consumers()
    )


def drop_uniform_masks_(model: ir.Model) -> int:
    """Replace ``Where`` whose condition is the same everywhere by the branch it takes."""
    changed = 0
    for node in list(model.graph):
        if node.op_type != "Where":
            continue
        condition = constant(node.inputs[0])
        if condition is None or condition.size == 0 or condition.min() != condition.max():
            continue
        taken = node.inputs[1] if condition.flat[0] else node.inputs[2]
        result = node.outputs[0]
        if taken is None:
            continue
        if shape_of(taken) != shape_of(result) and not _broadcasts_in_readers(result):
            continue
        Editor(model, node).substitute(result, taken)
        changed += 1
    return changed


def _broadcasts_in_readers(value: ir.Value) -> bool:
    """Whether every reader would have the same result with a smaller tensor that broadcasts to ``value``."""
    if value.is_graph_output():
        return False
    for node, index in value.uses():
        if node.op_type not in ELEMENTWISE:
            return False
        others = [
            shape_of(other) for position, other in enumerate(node.inputs) if position != index
        ]
        if shape_of(node.outputs[0]) not in others:
            return False
    return True


def drop_neutral_(model: ir.Model) -> int:
    """Remove additions of zero and multiplications by one that change no shape."""
    changed = 0
    for node in list(model.graph):
        if node.op_type not in _NEUTRAL:
            continue
        for index in (1, 0) if node.op_type in ("Add", "Mul") else (1,):
            kept = node.inputs[1 - index]
            if (
                kept is None
                or shape_of(kept) is None
                or shape_of(kept) != shape_of(node.outputs[0])
            ):
                continue
            if _is_everywhere(node.inputs[index], _NEUTRAL[node.op_type]):
                Editor(model, node).substitute(node.outputs[0], kept)
                changed += 1
                break
    return changed


def _is_everywhere(value: ir.Value | None, number: float) -> bool:
    if scalar(value) is not None:
        return scalar(value) == number
    content = constant(value)
    # One axis: a bias or a norm's weight. It is a parameter, and a checkpoint in which it happens to be
    # neutral must not get another graph, and other figures, than one in which it is not.
    if content is None or content.ndim == 1 or content.size == 0:
        return False
    return bool(np.all(content == number))


def drop_nan_guards_(model: ir.Model) -> int:
    """Remove ``Where(IsNaN(p), 0, p)`` after a softmax ``p`` none of whose rows is masked whole.

    The guard is for rows of minus infinities. Scores that no mask is added to, a constant one with a finite
    entry in every row, or one that is filled with finite numbers, have none.
    """
    changed = 0
    for node in list(model.graph):
        guarded = _guarded_softmax(node)
        if guarded is None or not _rows_are_finite(guarded.inputs[0]):
            continue
        Editor(model, node).substitute(node.outputs[0], guarded.outputs[0])
        changed += 1
    return changed


def _guarded_softmax(node: ir.Node) -> ir.Node | None:
    if node.op_type != "Where" or scalar(node.inputs[1]) != 0.0:
        return None
    test, softmax = made_by(node.inputs[0], "IsNaN"), made_by(node.inputs[2], "Softmax")
    return softmax if test is not None and test.inputs[0] is node.inputs[2] else None


def _rows_are_finite(scores: ir.Value | None) -> bool:
    node = scores.producer() if scores is not None else None
    if node is None:
        return False
    if node.op_type == "Add":
        for index in (0, 1):
            mask = constant(node.inputs[index])
            if mask is not None:
                rows_open = mask.ndim == 0 or bool(np.isfinite(mask).any(axis=-1).all())
                return rows_open and _rows_are_finite(node.inputs[1 - index])
            if _is_finite_fill(node.inputs[index]):
                return _rows_are_finite(node.inputs[1 - index])
        return False
    if node.op_type == "Where":  # a fill that is finite leaves no row of infinities
        fill = scalar(node.inputs[2])
        return fill is not None and bool(np.isfinite(fill)) and _rows_are_finite(node.inputs[1])
    if node.op_type in ("Mul", "Div"):
        return any(
            scalar(node.inputs[index]) is not None and _rows_are_finite(node.inputs[1 - index])
            for index in (0, 1)
        )
    return node.op_type == "MatMul"


def _is_finite_fill(mask: ir.Value | None) -> bool:
    """Whether a mask that is known at run time only is one of two finite numbers everywhere."""
    where = made_by(mask, "Where")
    fills = [scalar(value) for value in where.inputs[1:]] if where is not None else [None]
    return all(fill is not None and bool(np.isfinite(fill)) for fill in fills)
