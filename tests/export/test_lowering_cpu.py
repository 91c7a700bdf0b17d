from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from quantvla.export.graphs import export_graph, save_graph
from quantvla.export.half_scales import store_half_scales_
from quantvla.export.lowering_cpu import lower
from quantvla.families.base import Stage
from quantvla.quantized_linear import QuantizedLinear
from quantvla.quantizer import integer_linear, quantize_weight
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.manifest import TensorSpec


@pytest.mark.parametrize("level", ["ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"])
@pytest.mark.parametrize(
    ("tokens", "out_features", "in_features", "block", "bias"),
    [
        (1, 8, 16, 16, False),
        (7, 40, 96, 32, True),
        (50, 64, 720, 16, False),
        (33, 129, 256, 128, True),
    ],
)
def test_the_kernel_computes_the_reference(
    tmp_path: Path,
    tokens: int,
    out_features: int,
    in_features: int,
    block: int,
    bias: bool,
    level: str,
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = quantize_weight(torch.randn(out_features, in_features, generator=generator), 4, block)
    offset = torch.randn(out_features, generator=generator) if bias else None
    stage = Stage(
        "one", lower("site", QuantizedLinear(weight, offset)),
        (TensorSpec(name="x", dtype="float32", shape=(1, tokens, in_features)),),
        (TensorSpec(name="y", dtype="float32", shape=(1, tokens, out_features)),),
    )  # fmt: skip
    model = export_graph(stage)
    assert store_half_scales_(model) == 1
    save_graph(model, tmp_path / "one.onnx")
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    session = ort.InferenceSession(
        tmp_path / "one.onnx", options, providers=["CPUExecutionProvider"]
    )
    x = torch.randn(1, tokens, in_features, generator=generator)
    x[0, 0] = 0  # a token of zeros has no scale
    (found,) = session.run(None, {"x": x.numpy()})
    expected = integer_linear(x, weight, offset).numpy()
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


def test_a_width_without_kernel_is_refused() -> None:
    weight = quantize_weight(torch.randn(8, 32), 3, 32)
    with pytest.raises(
        QuantVLAError,
        match=r"some\.site: no kernel on target 'cpu' for weights of this width, got 3",
    ):
        lower("some.site", QuantizedLinear(weight, None))


def test_scales_that_half_precision_cannot_hold_are_a_defect() -> None:
    weight = quantize_weight(torch.randn(8, 32), 4, 32)
    module = lower("site", QuantizedLinear(weight, None))
    assert isinstance(module, nn.Module)
    module.get_buffer("scales").mul_(1 + 1e-6)
    stage = Stage(
        "one", module,
        (TensorSpec(name="x", dtype="float32", shape=(1, 2, 32)),), (TensorSpec(name="y", dtype="float32", shape=(1, 2, 8)),),
    )  # fmt: skip
    with pytest.raises(ValueError, match="not half-precision"):
        store_half_scales_(export_graph(stage))
