"""Operations and bytes of an exported engine, read from its graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from quantvla.roofline import Product, StageWork
from quantvla.runtime.errors import explain
from quantvla.runtime.manifest import Manifest, StageSpec
from quantvla.runtime.site_formats import SiteFormats

# nodes that start a kernel of their own after fusion; what is elementwise joins its neighbours
_KERNELS = frozenset({"MatMul", "Gemm", "Conv", "Softmax", "LayerNormalization", "ReduceMean"})


def engine_work(directory: Path, manifest: Manifest, formats: SiteFormats) -> tuple[StageWork, ...]:
    """Return the work of every stage of an engine for a GPU target, each linear in its planned format."""
    planned = {site.node: site.format for site in formats.sites}
    return tuple(
        _stage_work(directory, stage, planned, formats.activations) for stage in manifest.stages
    )


def _stage_work(
    directory: Path, stage: StageSpec, planned: dict[str, str], activations: str
) -> StageWork:
    graph = ir.load(directory / stage.file).graph
    products, chosen, kernels = [], [], 0
    for node in graph:
        kernels += node.op_type in _KERNELS
        if node.op_type in ("MatMul", "Gemm", "Conv"):
            products.append(_product(node))
            chosen.append(planned.get(node.name or "", activations))
    return StageWork(stage.name, stage.repeat, tuple(products), kernels, tuple(chosen))


def _product(node: ir.Node) -> Product:
    left, right, out = _shape(node, node.inputs[0]), _shape(node, node.inputs[1]), node.outputs[0]
    made = _shape(node, out)
    stored = _is_stored(node.inputs[1])
    name = node.name or node.op_type
    if node.op_type == "Conv":
        pixels = int(np.prod(made)) // made[1]
        return Product(name, pixels, int(np.prod(right[1:])), right[0], 1, stored)
    outer = made[-1]
    if stored or len(right) == 2:
        return Product(name, int(np.prod(left[:-1])), left[-1], outer, 1, stored)
    return Product(name, left[-2], left[-1], outer, int(np.prod(made[:-2])), stored)


def _is_stored(value: ir.Value | None) -> bool:
    """Return whether a product's right side is a weight: a constant, as it is or dequantized."""
    if value is None:
        return False
    producer = value.producer()
    if producer is not None and producer.op_type in ("DequantizeLinear", "Transpose", "Cast"):
        return _is_stored(producer.inputs[0])
    return value.const_value is not None


def _shape(node: ir.Node, value: ir.Value | None) -> tuple[int, ...]:
    if value is None or value.shape is None or not value.shape.is_static():
        raise explain(
            f"node {node.name}", "has no fixed shape in the graph", remedy="export the engine again"
        )
    return tuple(int(dim) for dim in value.shape.numpy())
