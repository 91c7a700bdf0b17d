"""Reading the integer weights back out of an engine's graphs.

Verification compares the engine with a reference that computes with exactly these integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from quantvla.export.kernels import INT8_ACCURACY_LEVEL, KERNELS, MATMUL_NBITS
from quantvla.quantizer import QuantizedWeight, unpack_codes
from quantvla.runtime.errors import explain
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
        model = ir.load(directory / stage.file)
        for node in model.graph:
            if node.op_type in KERNELS:
                found = _read(node, stage.name)
                if found.site not in sites:
                    sites.add(found.site)
                    yield found


def site_name(node: ir.Node) -> str:
    """Return the site an integer kernel stands for, from the name of its weight."""
    weight = node.inputs[KERNELS[node.op_type].weight]
    name = (weight.name if weight is not None else None) or ""
    return name.removeprefix("policy.").removesuffix(".qweight")


def _read(node: ir.Node, stage: str) -> IntegerSite:
    kernel = KERNELS[node.op_type]
    codes, scales = _constant(node, kernel.weight), _constant(node, kernel.scales)
    has_bias = len(node.inputs) > kernel.bias and node.inputs[kernel.bias] is not None
    return IntegerSite(
        site=site_name(node),
        stage=stage,
        weight=_weight(node, _tensor(codes), _tensor(scales).half()),
        bias=_tensor(_constant(node, kernel.bias)) if has_bias else None,
        stored_bytes=codes.nbytes + scales.nbytes,
    )


def _weight(node: ir.Node, codes: Tensor, scales: Tensor) -> QuantizedWeight:
    if node.op_type != MATMUL_NBITS.operator:
        return QuantizedWeight(
            codes.t().contiguous(), scales.view(-1, 1), bits=8, block=codes.shape[0],
            inputs="uint8_tensor",
        )  # fmt: skip
    bits = node.attributes["bits"].as_int()
    int8 = node.attributes["accuracy_level"].as_int() == INT8_ACCURACY_LEVEL
    return QuantizedWeight(
        codes=unpack_codes(codes.view(codes.shape[0], -1), bits),
        scales=scales,
        bits=bits,
        block=node.attributes["block_size"].as_int(),
        inputs="int8_block" if int8 else "float",
    )


def _tensor(constant: ir.TensorProtocol) -> Tensor:
    return torch.from_numpy(np.array(constant.numpy()))


def _constant(node: ir.Node, index: int) -> ir.TensorProtocol:
    value = node.inputs[index]
    if value is not None and value.const_value is None:
        producer = value.producer()
        value = producer.inputs[0] if producer is not None and producer.op_type == "Cast" else None
    if value is None or value.const_value is None:
        raise explain(
            node.name or node.op_type,
            f"input {index} is not stored in the graph",
            remedy="export again",
        )
    return value.const_value
