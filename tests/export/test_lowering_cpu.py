from __future__ import annotations

from dataclasses import replace
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
from quantvla.runtime.kernels import session_options
from quantvla.runtime.machine import saturates_u8s8
from quantvla.runtime.manifest import TensorSpec
from quantvla.schemes import INTEGER_SCHEMES, Inputs, resolve_scheme

SHAPES = [
    (1, 8, 16, 16, False),
    (7, 40, 96, 32, True),
    (50, 64, 720, 16, False),
    (33, 129, 256, 128, True),
    (130, 48, 768, 256, True),
]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Several(nn.Module):
    """Independent kernels in one graph, because an export takes its time."""

    def __init__(self, kernels: list[nn.Module]) -> None:
        super().__init__()
        self.kernels = nn.ModuleList(kernels)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(kernel(x) for kernel, x in zip(self.kernels, inputs, strict=True))


def run_kernels(
    directory: Path, linears: list[QuantizedLinear], inputs: list[torch.Tensor]
) -> dict[str, list[np.ndarray]]:
    """Return the kernels' outputs by level of graph optimization."""
    outputs = [
        (*x.shape[:-1], linear.out_features) for x, linear in zip(inputs, linears, strict=True)
    ]
    stage = Stage(
        "several",
        Several([lower("site", linear) for linear in linears]),
        tuple(TensorSpec(name=f"x{i}", dtype="float32", shape=tuple(x.shape)) for i, x in enumerate(inputs)),
        tuple(TensorSpec(name=f"y{i}", dtype="float32", shape=shape) for i, shape in enumerate(outputs)),
    )  # fmt: skip
    model = export_graph(stage)
    assert store_half_scales_(model) == len(linears)
    save_graph(model, directory / "several.onnx")
    found = {}
    levels = ["ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"]
    if saturates_u8s8():  # what makes sums right there is a rewrite of the higher level
        levels.remove("ORT_ENABLE_BASIC")
    for level in levels:
        options = session_options()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        session = ort.InferenceSession(
            directory / "several.onnx", options, providers=["CPUExecutionProvider"]
        )
        found[level] = session.run(None, {f"x{i}": x.numpy() for i, x in enumerate(inputs)})
    return found


OTHER_INPUTS: dict[Inputs, Inputs] = {
    "int8_block": "float", "float": "int8_block", "uint8_tensor": "float"
}  # fmt: skip


@pytest.mark.parametrize("name", INTEGER_SCHEMES)
def test_the_kernel_computes_the_reference(tmp_path: Path, name: str) -> None:
    linears, inputs = [], []
    for tokens, out_features, in_features, block, bias in SHAPES:
        scheme = resolve_scheme(name, (block,), site="site", in_features=in_features)
        weight = quantize_weight(
            random(out_features, in_features, seed=0), scheme.weight_bits, scheme.block,
            inputs=scheme.inputs,
        )  # fmt: skip
        linears.append(QuantizedLinear(weight, random(out_features, seed=1) if bias else None))
        x = random(1, tokens, in_features, seed=2) + 0.5  # not centred: a zero point matters
        if tokens > 1:
            x[0, 0] = 0  # a token of zeros has no scale
        inputs.append(x)
    for found in run_kernels(tmp_path, linears, inputs).values():
        for y, linear, x in zip(found, linears, inputs, strict=True):
            expected = linear(x).numpy()
            assert np.abs(y - expected).max() <= 2e-5 * np.abs(expected).max()
            weight = linear.quantized  # the bound tells the formats apart
            other = replace(weight, inputs=OTHER_INPUTS[weight.inputs])
            different = integer_linear(x, other, linear.bias).numpy()
            assert np.abs(y - different).max() > 1e-4 * np.abs(expected).max()


def test_the_per_tensor_kernel_agrees_on_inputs_of_one_sign_and_of_two(tmp_path: Path) -> None:
    weight = quantize_weight(random(24, 64, seed=0), 8, 64, inputs="uint8_tensor")
    uniform = torch.rand(2, 5, 64, generator=torch.Generator().manual_seed(1)) * 4
    inputs = [uniform - 3, uniform, uniform + 2, -uniform - 1, torch.zeros(2, 5, 64)]
    linears = [QuantizedLinear(weight, None) for _ in inputs]
    for found in run_kernels(tmp_path, linears, inputs).values():
        for y, x in zip(found, inputs, strict=True):
            expected = integer_linear(x, weight).numpy()
            assert np.abs(y - expected).max() <= 2e-6 * np.abs(expected).max()


def test_a_width_without_kernel_is_refused() -> None:
    weight = quantize_weight(torch.randn(8, 32), 3, 32)
    with pytest.raises(
        QuantVLAError,
        match=r"some\.site: no kernel on target 'cpu' for weights of this width, got 3 with int8_block",
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
