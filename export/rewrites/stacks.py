"""Taking one element out of a stack of tensors, without the stack."""

from __future__ import annotations

import onnx_ir as ir

from quantvla.export.rewrites.graph import Editor, made_by, scalar, shape_of


def unstack_(model: ir.Model) -> int:
    """Replace ``Gather(Concat(parts, axis), i, axis)`` by part i, where every part has length one there."""
    changed = 0
    for node in list(model.graph):
        if node.op_type != "Gather":
            continue
        index, stack = scalar(node.inputs[1]), made_by(node.inputs[0], "Concat")
        if index is None or stack is None or shape_of(node.inputs[1]) != ():
            continue
        axis = stack.attributes["axis"].as_int()
        gathered = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        shapes = [shape_of(part) for part in stack.inputs]
        whole, shape = shape_of(node.inputs[0]), shape_of(node.outputs[0])
        if whole is None or shape is None or axis % len(whole) != gathered % len(whole):
            continue
        if any(part is None or part[axis] != 1 for part in shapes):
            continue
        part = stack.inputs[int(index)]
        if part is None:
            continue
        editor = Editor(model, node)
        editor.substitute(node.outputs[0], editor.reshape(part, shape))
        changed += 1
    return changed
