"""4-bit floats: the numbers, and the graph whose definition ONNX Runtime runs in the place of TensorRT's operator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import small_block as block
import torch

from quantvla.activation_scales import StaticInput
from quantvla.export.graphs import save_graph
from quantvla.export.nvfp4 import (
    BLOCK,
    DYNAMIC_QUANTIZE,
    dequantize_blocks,
    quantize_blocks,
    weight_blocks,
)
from quantvla.export.nvfp4_unfused import unfuse_file
from quantvla.export.tensorrt_rules import check_graph
from quantvla.export.tensorrt_sites import TargetSite, place_sites_
from quantvla.families.base import Stage
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.targets import TARGETS, formats_of

TOKENS, IN, OUT = 5, 64, 24


@pytest.fixture(scope="module")
def stage() -> Stage:
    return block.make_stage()


@pytest.fixture(scope="module")
def graph(stage: Stage) -> ir.Model:
    return block.lower(stage, "nvfp4")


def _loud(seed: int, *shape: int) -> np.ndarray:
    """Values over many orders of magnitude, with a block of zeros."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal(shape) * 10.0 ** generator.uniform(-4, 2, shape)
    x[..., :BLOCK] = 0
    return x.astype(np.float16).astype(np.float32)


def test_a_value_moves_by_at_most_half_the_widest_gap_of_its_block() -> None:
    x = _loud(0, 40, IN)
    codes, scales = quantize_blocks(x, float(np.abs(x).max()) / (6 * 448))
    found = dequantize_blocks(codes, scales, float(np.abs(x).max()) / (6 * 448))
    largest = np.repeat(np.abs(x).reshape(40, -1, BLOCK).max(-1), BLOCK, axis=1)
    small = float(np.abs(x).max()) / (6 * 448) * 2.0**-6  # below, E4M3 has no full precision
    assert (np.abs(found - x) <= largest / 6 * 1.15 + 6 * small).all()
    assert (found[:, :BLOCK] == 0).all()


def test_values_that_the_format_holds_are_kept() -> None:
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    x = np.concatenate([grid, -grid])[None] * np.float32(0.25)
    codes, scales = quantize_blocks(x, 1 / 1024)
    assert np.array_equal(dequantize_blocks(codes, scales, 1 / 1024), x)


def test_a_weight_takes_the_better_of_two_scales_in_each_block() -> None:
    weight = np.random.default_rng(1).standard_normal((32, 128)).astype(np.float32)
    codes, scales, tensor_scale = weight_blocks(weight)
    error = np.square(dequantize_blocks(codes, scales, float(tensor_scale)) - weight)
    both = []
    for full in (6.0, 4.0):
        one = dequantize_blocks(*quantize_blocks(weight, float(tensor_scale), full), float(tensor_scale))  # fmt: skip
        both.append(np.square(one - weight).reshape(32, -1, BLOCK).sum(-1))
    assert np.array_equal(error.reshape(32, -1, BLOCK).sum(-1), np.minimum(*both))
    assert error.sum() < 0.97 * both[0].sum()


def _linear(weight: torch.Tensor, scale: float) -> ir.Model:
    x = ir.Value(name="x", shape=ir.Shape((TOKENS, IN)), type=ir.TensorType(ir.DataType.FLOAT))
    mark = ir.node("Site", [x], attributes={"site": "linear"}, domain="quantvla")
    mark.outputs[0].name, mark.outputs[0].shape = "y", ir.Shape((TOKENS, OUT))
    mark.outputs[0].type = x.type
    graph = ir.Graph([x], mark.outputs, nodes=[mark], opset_imports={"": 21, "quantvla": 1})
    model = ir.Model(graph, ir_version=10)
    static = StaticInput(torch.ones(IN), scale, None, 0.0)
    place_sites_(model, {"linear": TargetSite("linear", "nvfp4", weight, None, static)}, "fp16")
    return model


@pytest.mark.parametrize(
    "headroom", [1.0, 0.25]
)  # 0.25: block scales beyond E4M3, inputs are clipped
def test_onnx_runtime_computes_the_definition(tmp_path: Path, headroom: float) -> None:
    weight = torch.from_numpy(np.random.default_rng(2).standard_normal((OUT, IN)))
    x = _loud(3, TOKENS, IN)
    scale = np.float32(np.abs(x).max() / (6 * 448) * headroom)
    path = tmp_path / "linear.onnx"
    save_graph(_linear(weight.float(), float(scale)), path)
    assert unfuse_file(path)
    assert not unfuse_file(path), "nothing is left to replace"
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x})
    rounded = dequantize_blocks(*quantize_blocks(x, float(scale)), float(scale))
    codes, scales, tensor_scale = weight_blocks(weight.float().numpy())
    wide = dequantize_blocks(codes, scales, float(tensor_scale)).astype(np.float16)
    expected = rounded.astype(np.float16).astype(np.float32) @ wide.T.astype(np.float32)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


def test_sites_of_one_input_share_its_quantization(stage: Stage) -> None:
    from quantvla.export.tensorrt_engine import lower_graph_

    sites, model = block.target_sites(stage, "nvfp4"), block.marked_graph(stage)
    for name in ("k", "v"):
        old = sites[name]
        sites[name] = TargetSite(name, "nvfp4", old.weight, old.bias, sites["q"].static)
    lower_graph_(model, sites, "fp16", frozenset())
    quantized = [node for node in model.graph if node.op_type == DYNAMIC_QUANTIZE]
    assert len(quantized) == len(block.SITES) - 2


def test_the_block_is_near_the_float_one(stage: Stage, graph: ir.Model, tmp_path: Path) -> None:
    block.write(graph.clone(), tmp_path)
    assert unfuse_file(tmp_path / "prefix.onnx")
    x, mask = block.example(99)
    session = ort.InferenceSession(tmp_path / "prefix.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy(), "mask": mask.numpy()})
    with torch.no_grad():
        expected = stage.module(x, mask).numpy()
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected - x.numpy())
    assert 0.02 < error < 0.3, "4-bit floats round by several percent"


def test_only_targets_with_4_bit_floats_read_the_graph(graph: ir.Model) -> None:
    check_graph(graph, "prefix", TARGETS["jetson-thor"], formats_of(110))
    check_graph(graph, "prefix", TARGETS["rtx"], formats_of(120))
    with pytest.raises(QuantVLAError, match=r"the GPU has no nvfp4, got float4e2m1; export with"):
        check_graph(graph, "prefix", TARGETS["rtx"], formats_of(89))
    with pytest.raises(QuantVLAError, match=r"tensorrt 10.3 reads ONNX opset 21 at most, got 23"):
        check_graph(graph, "prefix", TARGETS["jetson-orin"], formats_of(87))
    older = graph.clone()
    older.graph.opset_imports[""] = 21
    with pytest.raises(QuantVLAError, match=r"no operator for it, got trt::TRT_FP4DynamicQuantize"):
        check_graph(older, "prefix", TARGETS["jetson-orin"], formats_of(110))
