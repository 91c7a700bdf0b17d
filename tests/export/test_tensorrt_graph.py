"""Strongly typed graphs: types where they belong, and numbers that ONNX Runtime confirms unfused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import small_block as block
import torch

from quantvla.activation_scales import expected_largest, fits_int8, static_input
from quantvla.export.eight_bits import fp8_tensor, integer_columns
from quantvla.export.half_precision import SENSITIVE, narrow_doubles_
from quantvla.export.tensorrt_rules import check_graph
from quantvla.families.base import Stage
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.site_formats import SiteFormat
from quantvla.runtime.targets import TARGETS, formats_of
from quantvla.runtime.tensorrt_layers import layers_of_listing, site_results
from quantvla.runtime.tensorrt_library import BuildMessages, load_library, make_logger
from quantvla.statistics import SiteStatistics

FORMATS = ("fp16", "int8", "int4", "fp8", "nvfp4")
FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


@pytest.fixture(scope="module")
def stage() -> Stage:
    return block.make_stage()


@pytest.fixture(scope="module")
def graphs(stage: Stage) -> dict[str, ir.Model]:
    return {name: block.lower(stage, name) for name in FORMATS}


def _floats(values: object) -> list[ir.DataType]:
    return [v.dtype for v in values if v is not None and v.dtype in (FLOAT, HALF)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("number_format", FORMATS)
def test_every_node_has_inputs_of_one_float_type(
    graphs: dict[str, ir.Model], number_format: str
) -> None:
    for node in graphs[number_format].graph:
        kinds = _floats(node.inputs[:1] if node.domain == "trt" else node.inputs)  # scale: float32
        assert len(set(kinds)) <= 1, f"{node.name} mixes {kinds}"
        if node.op_type == "MatMul":
            assert kinds == [HALF, HALF], node.name
        if node.op_type in SENSITIVE:
            assert set(kinds) == {FLOAT}, node.name


def test_the_interface_stays_float32(graphs: dict[str, ir.Model]) -> None:
    graph = graphs["int8"].graph
    assert [v.dtype for v in (*graph.inputs, *graph.outputs)] == [FLOAT, ir.DataType.BOOL, FLOAT]


def test_masks_are_finite_in_half_precision(graphs: dict[str, ir.Model]) -> None:
    for value in graphs["fp16"].graph.initializers.values():
        assert value.const_value is not None
        array = value.const_value.numpy()
        if array.dtype.kind == "f":
            assert np.isfinite(array).all(), value.name


def test_the_scale_of_attention_stands_before_the_product(graphs: dict[str, ir.Model]) -> None:
    (softmax,) = [n for n in graphs["fp16"].graph if n.op_type == "Softmax"]
    value = softmax.inputs[0]
    seen = []
    while value is not None and (node := value.producer()) is not None and node.op_type != "MatMul":
        seen.append(node.op_type)
        value = node.inputs[1 if node.op_type == "Where" else 0]
    assert "Mul" not in seen and "Div" not in seen


def test_float64_is_computed_in_float32() -> None:
    x = ir.Value(name="x", shape=ir.Shape((2,)), type=ir.TensorType(FLOAT))
    double = ir.DataType.DOUBLE
    frequency = ir.Value(
        name="frequency", shape=ir.Shape(()), type=ir.TensorType(double),
        const_value=ir.tensor(np.array(1 / 3), name="frequency"),
    )  # fmt: skip
    wide = ir.node("Cast", [x], attributes={"to": double.value})
    angle = ir.node("Mul", [wide.outputs[0], frequency])
    back = ir.node("Cast", [angle.outputs[0]], attributes={"to": FLOAT.value})
    for node, kind in ((wide, double), (angle, double), (back, FLOAT)):
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(kind), x.shape
    graph = ir.Graph(
        [x],
        back.outputs,
        nodes=[wide, angle, back],
        initializers=[frequency],
        opset_imports={"": 21},
    )
    narrow_doubles_(ir.Model(graph, ir_version=10))
    values = [*graph.initializers.values(), *(node.outputs[0] for node in graph)]
    assert {value.dtype for value in values} == {FLOAT}
    assert wide.attributes["to"].as_int() == FLOAT.value


def test_sites_of_one_input_share_its_quantization(stage: Stage) -> None:
    sites = block.target_sites(stage, "int8")
    for name in ("k", "v"):
        sites[name] = type(sites[name])(
            name, "int8", sites[name].weight, sites[name].bias, sites["q"].static
        )
    model = block.marked_graph(stage)
    from quantvla.export.tensorrt_engine import lower_graph_

    lower_graph_(model, sites, "fp16", frozenset())
    quantized = [n for n in model.graph if n.op_type == "QuantizeLinear"]
    assert len(quantized) == len(block.SITES) - 2


def _run(model: ir.Model, directory: Path, seed: int) -> tuple[np.ndarray, np.ndarray]:
    block.write(model, directory)
    x, mask = block.example(seed)
    options = ort.SessionOptions()
    # with its extended optimizations ONNX Runtime 1.32 fuses the block-wise int4 weight wrongly
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = ort.InferenceSession(
        directory / "prefix.onnx", options, providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"x": x.numpy(), "mask": mask.numpy()})
    return found - x.numpy(), x.numpy()


@pytest.mark.parametrize(
    ("number_format", "limit"), [("fp16", 0.003), ("int8", 0.08), ("fp8", 0.12)]
)
def test_onnx_runtime_confirms_the_numbers(
    stage: Stage, graphs: dict[str, ir.Model], tmp_path: Path, number_format: str, limit: float
) -> None:
    found, x = _run(graphs[number_format], tmp_path, seed=99)
    with torch.no_grad():
        expected = stage.module(*block.example(99)).numpy() - x
    assert np.linalg.norm(found - expected) <= limit * np.linalg.norm(expected)


def test_int4_codes_are_multiplied_as_they_are_stored(stage: Stage, tmp_path: Path) -> None:
    sites = block.target_sites(stage, "int4")
    found, x = _run(block.lower(stage, "int4"), tmp_path, seed=99)
    linears = {name: stage.module.get_submodule(name) for name in block.SITES}
    kept = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    with torch.no_grad():
        for name, linear in linears.items():
            linear.weight.copy_(sites[name].weight.dequantize())  # type: ignore[union-attr]
        expected = stage.module(*block.example(99)).numpy() - x
        for name, linear in linears.items():
            linear.weight.copy_(kept[name])
    assert np.linalg.norm(found - expected) <= 0.003 * np.linalg.norm(expected)


def test_int4_products_are_products_of_matrices(graphs: dict[str, ir.Model]) -> None:
    """Else tensorrt_rtx widens the weight in a kernel of its own: the build below would list it."""
    nodes = [n for n in graphs["int4"].graph if n.name in block.SITES]
    assert len(nodes) == len(block.SITES)
    for node in nodes:
        assert [len(v.shape) for v in (*node.inputs, *node.outputs)] == [2, 2, 2]  # type: ignore[arg-type, union-attr]


def _listing(path: Path, compute_capability: int) -> str:
    library, messages = load_library("tensorrt_rtx"), BuildMessages()
    trt, logger = library.trt, make_logger(library, messages)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, logger).parse_from_file(str(path)), messages.errors
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{compute_capability}"), 0)
    assert builder.build_serialized_network(network, config) is not None, messages.errors
    return messages.layers


@pytest.mark.parametrize(
    ("number_format", "compute_capability"),
    [("fp16", 86), ("int8", 86), ("int4", 86), ("int4", 120), ("fp8", 89), ("nvfp4", 120)],
)
def test_tensorrt_runs_every_linear_of_the_block_in_its_format(
    graphs: dict[str, ir.Model], tmp_path: Path, number_format: str, compute_capability: int
) -> None:
    pytest.importorskip("tensorrt_rtx")
    spec = block.write(graphs[number_format], tmp_path)
    sites = tuple(SiteFormat(n, "prefix", n, number_format, 0, "") for n in block.SITES)
    listing = _listing(tmp_path / spec.file, compute_capability)
    results = site_results(sites, layers_of_listing(listing))
    assert [r for r in results if not r.kept] == []
    assert "_gemm_mha" in listing, "attention is not fused"


def test_smoothing_beats_one_plain_scale_where_a_channel_is_loud() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 32, generator=generator)
    x[:, 5] *= 60
    weight = torch.randn(16, 32, generator=generator)
    seen = SiteStatistics.empty(32)
    seen.add_(x, 1)
    chosen = static_input("site", weight, seen, "int8")
    assert chosen.exponent is not None

    def error(smoothing: torch.Tensor, scale: float) -> float:
        codes = (x / smoothing / scale).round().clamp(-127, 127)
        stored, column = integer_columns((weight * smoothing).numpy(), np.dtype(np.float32))
        restored = torch.from_numpy(stored * column[:, None])
        return float((codes * scale @ restored.T - x @ weight.T).norm())

    plain = error(torch.ones(32), float(x.abs().max()) / 127)
    assert error(chosen.smoothing, chosen.scale) < 0.5 * plain


def test_a_range_is_widened_by_what_half_of_the_calls_fell_short_of_the_other() -> None:
    seen = SiteStatistics.empty(4)
    for largest in ((1.0, 2.0, 0.0, 0.0), (1.0, 0.5, 3.0, 0.0)):
        seen.add_(torch.tensor([largest]), 2)
    assert seen.largest.tolist() == [1.0, 2.0, 3.0, 0.0]
    assert expected_largest(seen).tolist() == [1.0, 4.0, 12.0, 0.0]
    once = SiteStatistics.empty(2)
    once.add_(torch.tensor([[1.0, 2.0]]), 1)
    assert expected_largest(once).tolist() == [1.0, 2.0]


def test_an_input_with_rare_huge_entries_does_not_fit_one_int8_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 32, generator=generator)
    fits = []
    for rare in (1.0, 300.0):
        seen = SiteStatistics.empty(32)
        for _ in range(2):
            x = torch.randn(256, 32, generator=generator)
            x[0] *= rare
            seen.add_(x, 2)
        fits.append(fits_int8(static_input("site", weight, seen, "int8")))
    assert fits == [True, False]


def test_a_site_that_calibration_never_reached_has_no_scale() -> None:
    with pytest.raises(QuantVLAError, match=r"some\.site: calibration saw no input for it"):
        static_input("some.site", torch.ones(4, 8), SiteStatistics.empty(8), "int8")


def test_stored_weights_restore_within_half_a_step() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)
    codes, scales = integer_columns(weight, np.dtype(np.float16))
    step = scales.astype(np.float32)[:, None]
    assert np.abs(codes * step - weight).max() <= 0.51 * step.max()
    eighth, scale = fp8_tensor(weight, np.dtype(np.float16))
    restored = eighth.astype(np.float32) * np.float32(scale)
    assert (np.abs(restored - weight) <= np.abs(weight) / 15 + float(scale) / 256).all()


@pytest.mark.parametrize("number_format", ["fp16", "int8", "int4"])
def test_orin_reads_the_graphs(graphs: dict[str, ir.Model], number_format: str) -> None:
    check_graph(graphs[number_format], "prefix", TARGETS["jetson-orin"], formats_of(87))


def test_what_a_target_cannot_read_is_refused_at_export(
    stage: Stage, graphs: dict[str, ir.Model]
) -> None:
    orin = TARGETS["jetson-orin"]
    with pytest.raises(
        QuantVLAError, match=r"stage prefix, node .*: the GPU has no fp8, got float8"
    ):
        check_graph(graphs["fp8"], "prefix", orin, formats_of(87))
    model = block.lower(stage, "fp16")
    model.graph.opset_imports[""] = 23
    with pytest.raises(QuantVLAError, match=r"tensorrt 10.3 reads ONNX opset 21 at most, got 23"):
        check_graph(model, "prefix", orin, formats_of(87))
    check_graph(model, "prefix", TARGETS["jetson-thor"], formats_of(110))
    model = block.marked_graph(stage)
    with pytest.raises(QuantVLAError, match=r"has no operator for it, got quantvla::Site"):
        check_graph(model, "prefix", orin, formats_of(87))
    model = block.lower(stage, "fp16")
    next(iter(model.graph)).outputs[0].type = ir.TensorType(ir.DataType.DOUBLE)
    with pytest.raises(QuantVLAError, match=r"does not compute in this type, got double"):
        check_graph(model, "prefix", orin, formats_of(87))
