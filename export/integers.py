"""Reading the integer weights back out of an engine's graphs.

Verification compares the engine with a reference that computes with exactly these integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantvla.export.kernels import (
    DYNAMIC_MATMUL,
    INT8_ACCURACY_LEVEL,
    INTEGER_LINEAR,
    KERNELS,
    back_to_file,
    site_name,
)
from quantvla.export.panels import from_panels
from quantvla.export.rewrites.graph import shape_of
from quantvla.quantizer import QuantizedWeight, unpack_codes
from quantvla.runtime.errors import explain
from quantvla.runtime.kernels import graph_file
from quantvla.runtime.manifest import Manifest


@dataclass(frozen=True)
class IntegerSite:
    """One integer linear of a graph: its site, stage, weight and bias, and the bytes of weight and scales in the file."""

    site: str
    stage: str
    weight: QuantizedWeight
    bias: Tensor | None
    stored_bytes: int


def integer_sites(directory: Path, manifest: Manifest) -> Iterator[IntegerSite]:
    """Yield every integer linear of an engine, in graph order."""
    sites = set()
    for stage in manifest.stages:
        model = ir.load(directory / graph_file(stage))
        for node in model.graph:
            if node.op_type in KERNELS:
                found = _read(node, stage.name)
                if found.site not in sites:
                    sites.add(found.site)
                    yield found


def _read(node: ir.Node, stage: str) -> IntegerSite:
    kernel = KERNELS[node.op_type]
    (codes, _), (scales, _) = _stored(node, kernel.weight), _stored(node, kernel.scales)
    has_bias = len(node.inputs) > kernel.bias and node.inputs[kernel.bias] is not None
    return IntegerSite(
        site=site_name(node),
        stage=stage,
        weight=_weight(
            node,
            _tensor(_constant(node, kernel.weight)),
            _tensor(_constant(node, kernel.scales)).half(),
        ),
        bias=_tensor(_constant(node, kernel.bias)) if has_bias else None,
        stored_bytes=codes.nbytes + scales.nbytes,
    )


def _weight(node: ir.Node, codes: Tensor, scales: Tensor) -> QuantizedWeight:
    if node.op_type == DYNAMIC_MATMUL.operator:
        return QuantizedWeight(
            codes.t().contiguous(), scales.view(-1, 1), bits=8, block=codes.shape[0],
            inputs="uint8_tensor",
        )  # fmt: skip
    bits = node.attributes["bits"].as_int()
    if node.op_type == INTEGER_LINEAR.operator:
        rows = _tensor(from_panels(codes.numpy()))
        scales = scales.transpose(1, 2).reshape(rows.shape[0], -1)
        return QuantizedWeight(
            unpack_codes(rows, bits), scales.contiguous(), bits, node.attributes["block"].as_int()
        )
    int8 = node.attributes["accuracy_level"].as_int() == INT8_ACCURACY_LEVEL
    return QuantizedWeight(
        codes=unpack_codes(codes.reshape(codes.shape[0], -1), bits),
        scales=scales.reshape(codes.shape[0], -1),
        bits=bits,
        block=node.attributes["block_size"].as_int(),
        inputs="int8_block" if int8 else "float",
    )


def _tensor(content: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(content))


def _stored(node: ir.Node, index: int) -> tuple[ir.TensorProtocol, list[ir.Node]]:
    """Return the tensor in the file that an input is or is laid out from, and the layout nodes, the last one first."""
    value, nodes = back_to_file(node.inputs[index])
    if value is None or value.const_value is None:
        raise explain(
            node.name or node.op_type,
            f"input {index} is not stored in the graph",
            remedy="export again",
        )
    return value.const_value, nodes


def _constant(node: ir.Node, index: int) -> NDArray[Any]:
    """Return the content of an input, with the layout nodes between it and the file applied."""
    stored, nodes = _stored(node, index)
    content = stored.numpy()
    for made in reversed(nodes):
        shape = shape_of(made.outputs[0])
        if made.op_type == "Transpose":
            content = content.transpose(made.attributes["perm"].as_ints())
        elif made.op_type == "Reshape" and shape is not None:
            content = content.reshape(shape)
        elif made.op_type == "Expand" and shape is not None:
            content = np.broadcast_to(content, shape)
        elif made.op_type != "Cast":
            raise explain(
                node.name or node.op_type,
                f"input {index} is computed by {made.op_type}, which is no layout",
                remedy="export again",
            )
    return content
