"""The inputs and outputs of an engine's integer kernels, as the engine computes them."""

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
    INTEGER_LINEAR,
    KERNELS,
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
class _Names:
    """A kernel's values by their names in the graph."""

    site: str
    x: str
    y: str
    other: str | None
    activation: Activation
    combine: Combine


class Probe:
    """Runs a stage's graph with the inputs and outputs of its integer kernels as extra outputs."""

    def __init__(self, directory: Path, stage: StageSpec) -> None:
        model = ir.load(directory / graph_file(stage))
        self._inputs = [spec.name for spec in stage.inputs]
        self._sites: list[_Names] = []
        outputs: dict[str, ir.Value] = {}
        for node in model.graph:
            if node.op_type in KERNELS:
                x, y = node.inputs[0], node.outputs[0]
                other = node.inputs[OTHER_INPUT] if _combines(node) else None
                outputs |= {value.name: value for value in (x, y, other) if value and value.name}
                self._sites.append(_names(node, x, y, other))
        for value in outputs.values():
            value.type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.outputs.extend(outputs.values())
        with TemporaryDirectory() as work:
            save_graph(model, Path(work) / stage.file)
            self._session = ort.InferenceSession(
                Path(work) / stage.file, session_options(), providers=["CPUExecutionProvider"]
            )
        self._names = list(outputs)

    def __call__(self, tensors: Mapping[str, NDArray[Any]]) -> Iterator[SiteValues]:
        """Yield the values of every integer kernel for these stage inputs."""
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


def _combines(node: ir.Node) -> bool:
    return node.op_type == INTEGER_LINEAR.operator and len(node.inputs) > OTHER_INPUT


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
