"""From a stage to an ONNX graph on disk."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)

from quantvla.families.base import Stage
from quantvla.runtime.manifest import TensorSpec

OPSET = 21
_DTYPES = {"float32": torch.float32, "int64": torch.int64, "bool": torch.bool}


def export_graph(stage: Stage, *, opset: int = OPSET) -> ir.Model:
    """Return the stage as an ONNX graph with fixed shapes and the stage's tensor names."""
    inputs = tuple(example(spec) for spec in stage.inputs)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            stage.module, inputs, dynamo=True, opset_version=opset, verbose=False,
            input_names=[spec.name for spec in stage.inputs],
            output_names=[spec.name for spec in stage.outputs],
        )  # fmt: skip
    assert program is not None
    model = program.model
    RemoveUnusedNodesPass()(model)
    RemoveUnusedOpsetsPass()(model)
    ClearMetadataAndDocStringPass()(model)  # the exporter writes source paths there
    return model


def example(spec: TensorSpec) -> torch.Tensor:
    """Return a tensor of a spec's shape and dtype to trace with."""
    dtype = _DTYPES[spec.dtype]
    return torch.ones(spec.shape, dtype=dtype) if dtype != torch.float32 else torch.rand(spec.shape)


def save_graph(model: ir.Model, path: Path) -> tuple[str, ...]:
    """Write the graph and its weights (``<name>.data`` beside it); return the file names."""
    data = path.name + ".data"
    ir.save(model, path, external_data=data, size_threshold_bytes=1024)
    return (path.name, data) if (path.parent / data).is_file() else (path.name,)
