"""Root-mean-square norms as one operator."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quantvla.export.rewrites.graph import Editor, commuted, constant, made_by, scalar, shape_of

OPERATOR = (
    "SimplifiedLayerNormalization"  # ONNX Runtime's; the standard's RMSNormalization needs opset 23
)


def fuse_rms_norms_(model: ir.Model) -> int:
    """Replace ``x / sqrt(mean(x^2) + eps) [* weight]`` over the last axis by one node."""
    changed = 0
    for node in list(model.graph):
        if node.op_type != "Mul":
            continue
        found = _normalized(node)
        if found is None:
            continue
        x, epsilon = found
        shape = shape_of(node.outputs[0])
        if shape is None:
            continue
        scaled, weight = _weight(node, shape[-1])
        editor = Editor(model, scaled)
        if weight is None:
            weight = editor.constant(f"ones.{shape[-1]}", np.ones(shape[-1], dtype=np.float32))
        fused = editor.add(
            OPERATOR, [x, weight], shape=shape, axis=-1, epsilon=epsilon, stash_type=1
        )
        editor.substitute(scaled.outputs[0], fused)
        changed += 1
    return changed


def _normalized(node: ir.Node) -> tuple[ir.Value, float] | None:
    """Return x and epsilon if the node computes ``x * (1 / sqrt(mean(x^2) + epsilon))``."""
    for x, inverse in commuted(node):
        root = _reciprocal_of_root(inverse)
        total = made_by(root, "Add")
        if total is None or x is None:
            continue
        for mean_square, epsilon_value in commuted(total):
            epsilon, mean = scalar(epsilon_value), made_by(mean_square, "ReduceMean")
            if epsilon is not None and mean is not None and _is_mean_square_of(mean, x):
                return x, epsilon
    return None


def _reciprocal_of_root(value: ir.Value | None) -> ir.Value | None:
    reciprocal = made_by(value, "Reciprocal")
    root = made_by(reciprocal.inputs[0], "Sqrt") if reciprocal is not None else None
    return root.inputs[0] if root is not None else None


def _is_mean_square_of(mean: ir.Node, x: ir.Value) -> bool:
    axes = constant(mean.inputs[1]) if len(mean.inputs) > 1 else None
    shape = shape_of(x)
    keep = mean.attributes.get("keepdims")
    if axes is None or shape is None or axes.tolist() not in ([-1], [len(shape) - 1]):
        return False
    if keep is not None and keep.as_int() != 1:
        return False
    power, product = made_by(mean.inputs[0], "Pow"), made_by(mean.inputs[0], "Mul")
    if power is not None:
        return power.inputs[0] is x and scalar(power.inputs[1]) == 2.0
    return product is not None and product.inputs[0] is x and product.inputs[1] is x


def _weight(node: ir.Node, width: int) -> tuple[ir.Node, ir.Value | None]:
    """Return the multiplication by a weight that alone reads the norm, and the weight; else the norm's node."""
    value = node.outputs[0]
    users = value.consumers()
    if len(users) == 1 and users[0].op_type == "Mul" and not value.is_graph_output():
        for normalized, weight in commuted(users[0]):
            if normalized is not value or weight is None or weight.const_value is None:
                continue
            if shape_of(weight) == (width,):
                return users[0], weight
    return node, None
