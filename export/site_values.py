"""The inputs and outputs of an engine's integer kernels and own attentions, as the engine computes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from quantvla.export.graphs import save_graph
from quantvla.export.kernels import (
    ATTENTION,
    INTEGER_LINEAR,
    KERNELS,
    NATIVE_DOMAIN,
    OTHER_INPUT,
    Activation,
    Combine,
    site_name,
)
from quantvla.runtime.kernels import graph_file, session_options
from quantvla.runtime.manifest import StageSpec


@dataclass(frozen=True)
class SiteValues:
    """What went into one kernel, (..., in), and what came out, (..., out).

    What came out is ``activation`` of the linear layer's result, ``combine``d with ``other`` (..., out).
    """

    site: str
    x: NDArray[np.float32]
    y: NDArray[np.float32]
    activation: Activation = Activation.NONE
    combine: Combine = Combine.NONE
    other: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class AttentionValues:
    """What went into one attention of the project's own and what came out.

    ``q`` (batch, queries, heads * dim), ``k`` and ``v`` (batch, keys, heads * dim), ``bias`` (1 or batch, 1 or
    heads, queries, keys) added to the scaled scores; ``out`` like ``q``.
    """

    q: NDArray[np.float32]
    k: NDArray[np.float32]
    v: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    out: NDArray[np.float32]
    heads: int
    scale: float


@dataclass(frozen=True)
class _AttentionNames:
    """An attention's values by their names in the graph: ``inputs`` are q, k, v and the bias, if there is one."""

    inputs: tuple[str, ...]
    out: str
    heads: int
    scale: float


@dataclass(frozen=True)
class _Names:
    """A kernel's values by their names in the graph."""

    site: str
    x: str
    y: str
    other: str | None
    activation: Activation
    combine: Combine


class Probe:
    """Runs a stage's graph with the inputs and outputs of its integer kernels and own attentions as extra outputs."""

    def __init__(self, directory: Path, stage: StageSpec) -> None:
        model = ir.load(directory / graph_file(stage))
        self._inputs = [spec.name for spec in stage.inputs]
        self._sites: list[_Names] = []
        self._attentions: list[_AttentionNames] = []
        outputs: dict[str, ir.Value] = {}
        for node in model.graph:
            if node.op_type in KERNELS:
                x, y = node.inputs[0], node.outputs[0]
                other = node.inputs[OTHER_INPUT] if _combines(node) else None
                outputs |= {value.name: value for value in (x, y, other) if value and value.name}
                self._sites.append(_names(node, x, y, other))
            elif (node.domain, node.op_type) == (NATIVE_DOMAIN, ATTENTION):
                values = [value for value in (*node.inputs, node.outputs[0]) if value is not None]
                outputs |= {value.name: value for value in values if value.name}
                self._attentions.append(_attention_names(node))
        for value in outputs.values():
            value.type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.outputs.extend(outputs.values())
        with TemporaryDirectory() as work:
            save_graph(model, Path(work) / stage.file)
            self._session = ort.InferenceSession(
                Path(work) / stage.file, session_options(), providers=["CPUExecutionProvider"]
            )
        self._names = list(outputs)

    def __call__(
        self, tensors: Mapping[str, NDArray[Any]]
    ) -> Iterator[SiteValues | AttentionValues]:
        """Yield the values of every integer kernel and own attention for these stage inputs."""
        if not self._names:
            return
        feed = {name: tensors[name] for name in self._inputs}
        values = dict(zip(self._names, self._session.run(self._names, feed), strict=True))
        known = {**values, **feed}
        for names in self._sites:
            other = known[names.other] if names.other else None
            yield SiteValues(
                names.site, known[names.x], known[names.y], names.activation, names.combine, other
            )
        for own in self._attentions:
            q, k, v, *bias = (known[name] for name in own.inputs)
            yield AttentionValues(
                q, k, v, bias[0] if bias else None, known[own.out], own.heads, own.scale
            )


def _combines(node: ir.Node) -> bool:
    return node.op_type == INTEGER_LINEAR.operator and len(node.inputs) > OTHER_INPUT


def _attention_names(node: ir.Node) -> _AttentionNames:
    names = [value.name for value in (*node.inputs, node.outputs[0]) if value is not None]
    *inputs, out = (name or "" for name in names)
    heads, scale = node.attributes["num_heads"].as_int(), node.attributes["scale"].as_float()
    return _AttentionNames(tuple(inputs), out, heads, scale)


def _names(node: ir.Node, x: ir.Value | None, y: ir.Value, other: ir.Value | None) -> _Names:
    assert x is not None and x.name and y.name
    fused = {
        name: node.attributes[name].as_int() if name in node.attributes else 0
        for name in ("activation", "combine")
    }
    return _Names(
        site_name(node), x.name, y.name, other.name if other is not None else None,
        Activation(fused["activation"]), Combine(fused["combine"]),
    )  # fmt: skip
