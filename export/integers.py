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

from quantvla.export.half_scales import OPERATOR
from quantvla.quantizer import QuantizedWeight, unpack_int4
from quantvla.runtime.errors import explain
from quantvla.runtime.manifest import Manifest


@dataclass(frozen=True)
class IntegerSite:
    """One integer linear of a graph: its site, stage and weight, and the bytes it takes in the file."""

    site: str
    stage: str
    weight: QuantizedWeight
    stored_bytes: int


def integer_sites(directory: Path, manifest: Manifest) -> Iterator[IntegerSite]:
    """Yield every ``MatMulNBits`` of an engine, in graph order."""
    sites = set()
    for stage in manifest.stages:
        model = ir.load(directory / stage.file)
        for node in model.graph:
            if node.op_type == OPERATOR:
                found = _read(node, stage.name)
                if found.site not in sites:
                    sites.add(found.site)
                    yield found


def site_name(node: ir.Node) -> str:
    """Return the site an integer kernel stands for, from the name of its weight."""
    weight = node.inputs[1]
    name = (weight.name if weight is not None else None) or ""
    return name.removeprefix("policy.").removesuffix(".qweight")


def _read(node: ir.Node, stage: str) -> IntegerSite:
    codes, scales = _constant(node, 1), _constant(node, 2)
    packed = torch.from_numpy(np.array(codes.numpy()))
    half = torch.from_numpy(np.array(scales.numpy()))
    bits, block = node.attributes["bits"].as_int(), node.attributes["block_size"].as_int()
    weight = QuantizedWeight(
        codes=unpack_int4(packed.view(packed.shape[0], -1)),
        scales=half.half(),
        bits=bits,
        block=block,
    )
    return IntegerSite(
        site=site_name(node),
        stage=stage, weight=weight, stored_bytes=codes.nbytes + scales.nbytes,
    )  # fmt: skip


def _constant(node: ir.Node, index: int) -> ir.TensorProtocol:
    value = node.inputs[index]
    if value is not None and value.const_value is None:
        producer = value.producer()
        value = producer.inputs[0] if producer is not None and producer.op_type == "Cast" else None
    if value is None or value.const_value is None:
        raise explain(
            node.name or OPERATOR,
            f"input {index} is not stored in the graph",
            remedy="export again",
        )
    return value.const_value
