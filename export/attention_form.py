"""Attention in the form TensorRT fuses: scale on the query before the product, softmax without guards that guard nothing.

TensorRT fuses product, mask, softmax and product into one kernel if nothing else stands between them and
the scale is applied before the first product (its "Fused attention" guide; also better in fp16, where
unscaled logits can overflow). Exporters write the scale behind the product, and a NaN guard behind softmax.
A guard stays where a whole row may be masked.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from quantvla.export.rewrites.folding import drop_nan_guards_


def shape_attention_(model: ir.Model) -> int:
    """Rewrite every attention of the graph; returns how many rewrites were made."""
    changed = drop_nan_guards_(model)
    RemoveUnusedNodesPass()(model)
    for node in list(model.graph):
        if node.op_type == "Softmax":
            changed += _scale_first(model.graph, node)
    return changed


def _scale_first(graph: ir.Graph, softmax: ir.Node) -> int:
    """Move a scalar factor of the logits to the first input of the product."""
    found = _scaled_product(softmax.inputs[0])
    if found is None:
        return 0
    product, scale, factor_index = found
    factor, query = scale.inputs[factor_index], product.inputs[0]
    assert factor is not None and query is not None
    scaled = ir.node(scale.op_type, [query, factor], name=f"{product.name}.scaled_query")
    scaled.outputs[0].name = f"{scale.outputs[0].name}.query"
    scaled.outputs[0].shape, scaled.outputs[0].type = query.shape, query.type
    graph.insert_before(product, scaled)
    product.replace_input_with(0, scaled.outputs[0])
    ir.convenience.replace_all_uses_with(scale.outputs[0], product.outputs[0])
    graph.remove(scale, safe=True)
    return 1


def _scaled_product(logits: ir.Value | None) -> tuple[ir.Node, ir.Node, int] | None:
    """Return (product, scaling node, index of its scalar) behind ``logits``, through masks."""
    while logits is not None and (node := logits.producer()) is not None:
        if node.op_type in ("Mul", "Div"):
            for index, other in ((1, 0), (0, 1)):
                factor, value = node.inputs[index], node.inputs[other]
                if node.op_type == "Div" and index == 0:
                    continue
                producer = value.producer() if value is not None else None
                if (
                    _is_scalar(factor)
                    and producer is not None
                    and producer.op_type == "MatMul"
                    and len(producer.outputs[0].uses()) == 1
                ):
                    return producer, node, index
            return None
        if node.op_type == "Where":
            logits = node.inputs[1]
        elif node.op_type in ("Add", "Cast"):
            logits = node.inputs[0]
        else:
            return None
    return None


def _is_scalar(value: ir.Value | None) -> bool:
    constant = value.const_value if value is not None else None
    return constant is not None and constant.size == 1
