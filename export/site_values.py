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
from quantvla.export.integers import site_name
from quantvla.export.kernels import KERNELS
from quantvla.runtime.manifest import StageSpec


@dataclass(frozen=True)
class SiteValues:
    """What went into one kernel, (..., in), and what came out, (..., out)."""

    site: str
    x: NDArray[np.float32]
    y: NDArray[np.float32]


class Probe:
    """Runs a stage's graph with the inputs and outputs of its integer kernels as extra outputs."""

    def __init__(self, directory: Path, stage: StageSpec) -> None:
        model = ir.load(directory / stage.file)
        self._inputs = [spec.name for spec in stage.inputs]
        self._sites: list[tuple[str, str, str]] = []
        outputs: dict[str, ir.Value] = {}
        for node in model.graph:
            if node.op_type in KERNELS:
                x, y = node.inputs[0], node.outputs[0]
                assert x is not None and x.name and y.name
                outputs |= {x.name: x, y.name: y}
                self._sites.append((site_name(node), x.name, y.name))
        for value in outputs.values():
            value.type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.outputs.extend(outputs.values())
        with TemporaryDirectory() as work:
            save_graph(model, Path(work) / stage.file)
            self._session = ort.InferenceSession(
                Path(work) / stage.file, providers=["CPUExecutionProvider"]
            )
        self._names = list(outputs)

    def __call__(self, tensors: Mapping[str, NDArray[Any]]) -> Iterator[SiteValues]:
        """Yield the values of every integer kernel for these stage inputs."""
        if not self._names:
            return
        feed = {name: tensors[name] for name in self._inputs}
        values = dict(zip(self._names, self._session.run(self._names, feed), strict=True))
        for site, x, y in self._sites:
            yield SiteValues(site, values[x], values[y])
