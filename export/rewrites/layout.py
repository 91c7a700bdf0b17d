"""Chains of layout nodes in their shortest form."""

from __future__ import annotations

import onnx_ir as ir

from quantvla.export.rewrites.graph import Editor
from quantvla.export.rewrites.views import arrange, layout_node, view_of


def shorten_layouts_(model: ir.Model) -> int:
    """Rewrite every chain of Reshape, Transpose and the like as at most Reshape, Transpose, Reshape."""
    changed = 0
    for node in list(model.graph):
        last = node.outputs[0]
        if layout_node(last) is None or not _ends_chain(last):
            continue
        view = view_of(last)
        if view is None or view.repeated or view.source is last:
            continue
        length = _length(last, view.source)
        before = len(model.graph)
        result = arrange(Editor(model, node), view, view.viewed)
        if len(model.graph) - before < length:
            Editor(model, node).substitute(last, result)
            changed += 1
        else:
            _remove_chain(model, result, view.source)
    return changed


def _ends_chain(value: ir.Value) -> bool:
    """Whether something other than a layout node reads the value."""
    return value.is_graph_output() or any(
        layout_node(user.outputs[0]) is None or user.inputs[0] is not value
        for user in value.consumers()
    )


def _length(value: ir.Value, source: ir.Value) -> int:
    """Return how many layout nodes lead from ``source`` to ``value``."""
    count = 0
    while value is not source:
        node = layout_node(value)
        assert node is not None and node.inputs[0] is not None
        count, value = count + 1, node.inputs[0]
    return count


def _remove_chain(model: ir.Model, value: ir.Value, source: ir.Value) -> None:
    while value is not source and not value.uses():
        node = layout_node(value)
        assert node is not None and node.inputs[0] is not None
        value = node.inputs[0]
        model.graph.remove(node, safe=True)
