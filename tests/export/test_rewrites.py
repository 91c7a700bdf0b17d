"""Each rewrite computes what the graph before it computed, and does what it is for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from quantvla.export.rewrite_report import read_rewrites, unfused_attention
from quantvla.export.rewrites import FUSE_CPU, SHORTEN, SIMPLIFY, Rewrite, apply_rewrites_
from quantvla.export.rewrites.hoist import hoist_invariants_
from quantvla.export.rewrites.views import arrange, view_of
from quantvla.runtime.manifest import read_manifest

Arrays = dict[str, NDArray[Any]]
ALL = (*SIMPLIFY, *FUSE_CPU, *SHORTEN)
REWRITES = {rewrite.name: rewrite for rewrite in ALL}


class Sketch:
    """A graph under construction: `node` adds a node and returns its output."""

    def __init__(self, **inputs: tuple[int, ...]) -> None:
        self.inputs = {
            name: ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
            for name, shape in inputs.items()
        }
        graph = ir.Graph(list(self.inputs.values()), [], nodes=[], opset_imports={"": 21})
        self.model = ir.Model(graph, ir_version=10)

    def __getitem__(self, name: str) -> ir.Value:
        return self.inputs[name]

    def constant(self, content: Any) -> ir.Value:
        content = np.asarray(content)
        name = f"constant{len(self.model.graph.initializers)}"
        value = ir.Value(
            name=name, shape=ir.Shape(content.shape), const_value=ir.tensor(content, name=name),
            type=ir.TensorType(ir.DataType.from_numpy(content.dtype)),
        )  # fmt: skip
        self.model.graph.register_initializer(value)
        return value

    def node(
        self, operator: str, *inputs: ir.Value, shape: tuple[int, ...], dtype: ir.DataType = ir.DataType.FLOAT,
        outputs: int = 1, **attributes: Any,
    ) -> Any:  # fmt: skip
        node = ir.node(operator, list(inputs), attributes=attributes, num_outputs=outputs)
        for value in node.outputs:
            value.shape, value.type = ir.Shape(shape), ir.TensorType(dtype)
        self.model.graph.append(node)
        return node.outputs[0] if outputs == 1 else node.outputs

    def reshape(self, value: ir.Value, *shape: int) -> ir.Value:
        target = self.constant(np.array(shape, np.int64))
        return self.node("Reshape", value, target, shape=shape)

    def transpose(self, value: ir.Value, *permutation: int) -> ir.Value:
        assert value.shape is not None
        shape = value.shape.numpy()
        return self.node(
            "Transpose", value, shape=tuple(shape[axis] for axis in permutation), perm=permutation
        )

    def returns(self, value: ir.Value, name: str = "out") -> ir.Model:
        value.name = name
        self.model.graph.outputs.append(value)
        return self.model


def run(model: ir.Model, **inputs: NDArray[Any]) -> Arrays:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def check(model: ir.Model, rewrites: tuple[Rewrite, ...]) -> Counter[str]:
    """Apply, compare before and after on random inputs, return the operators left."""
    rng = np.random.default_rng(0)
    inputs = {
        str(value.name): rng.standard_normal(value.shape.numpy()).astype(np.float32)
        for value in model.graph.inputs
        if value.shape is not None
    }
    before = run(model, **inputs)
    apply_rewrites_(model, rewrites)
    after = run(model, **inputs)
    assert before.keys() == after.keys()
    for name, expected in before.items():
        np.testing.assert_allclose(after[name], expected, rtol=2e-5, atol=2e-6)
    return operators(model)


def slice_assignments(last_row: int) -> ir.Model:
    sketch = Sketch(a=(4, 3), b=(2, 3))
    rows = sketch.constant(np.arange(4, dtype=np.int64)[:, None])
    more = sketch.constant(np.arange(last_row - 1, last_row + 1, dtype=np.int64)[:, None])
    blank = sketch.constant(np.zeros((6, 3), np.float32))
    first = sketch.node("ScatterND", blank, rows, sketch["a"], shape=(6, 3))
    return sketch.returns(sketch.node("ScatterND", first, more, sketch["b"], shape=(6, 3)))


def test_slice_assignments_that_fill_a_tensor_are_a_concatenation() -> None:
    assert check(slice_assignments(5), ALL) == {"Concat": 1}


def test_slice_assignments_that_overlap_stay() -> None:
    assert check(slice_assignments(4), ALL)["ScatterND"] == 2


def rms_norm(epsilon: float, weight: NDArray[Any] | None) -> ir.Model:
    sketch = Sketch(x=(1, 5, 8))
    x = sketch["x"]
    square = sketch.node("Pow", x, sketch.constant(np.float32(2)), shape=(1, 5, 8))
    axes = sketch.constant(np.array([-1], np.int64))
    mean = sketch.node("ReduceMean", square, axes, shape=(1, 5, 1), keepdims=1)
    total = sketch.node("Add", mean, sketch.constant(np.float32(epsilon)), shape=(1, 5, 1))
    root = sketch.node("Sqrt", total, shape=(1, 5, 1))
    out = sketch.node("Mul", x, sketch.node("Reciprocal", root, shape=(1, 5, 1)), shape=(1, 5, 8))
    if weight is not None:
        out = sketch.node("Mul", sketch.constant(weight), out, shape=(1, 5, 8))
    return sketch.returns(out)


@pytest.mark.parametrize("weight", [None, np.linspace(-1, 2, 8, dtype=np.float32)])
def test_root_mean_square_norms_are_one_operator(weight: NDArray[Any] | None) -> None:
    assert check(rms_norm(1e-5, weight), ALL) == {"SimplifiedLayerNormalization": 1}


def test_a_mask_that_masks_nothing_and_its_guard_vanish() -> None:
    sketch = Sketch(s=(1, 2, 3, 4))
    open_everywhere = sketch.constant(np.ones((1, 1, 3, 4), np.bool_))
    zero, low = sketch.constant(np.float32(0)), sketch.constant(np.float32(-3e38))
    mask = sketch.node("Where", open_everywhere, zero, low, shape=(1, 1, 3, 4))
    product = sketch.node("MatMul", sketch["s"], sketch.constant(np.eye(4, dtype=np.float32)), shape=(1, 2, 3, 4))  # fmt: skip
    p = sketch.node("Softmax", sketch.node("Add", product, mask, shape=(1, 2, 3, 4)), shape=(1, 2, 3, 4), axis=-1)  # fmt: skip
    nan = sketch.node("IsNaN", p, shape=(1, 2, 3, 4), dtype=ir.DataType.BOOL)
    model = sketch.returns(sketch.node("Where", nan, zero, p, shape=(1, 2, 3, 4)))
    assert check(model, ALL) == {"MatMul": 1, "Softmax": 1}


def test_the_guard_of_a_mask_that_is_only_known_at_run_time_stays() -> None:
    sketch = Sketch(s=(1, 2, 3, 4), mask=(1, 2, 3, 4))
    scores = sketch.node("Add", sketch["s"], sketch["mask"], shape=(1, 2, 3, 4))
    p = sketch.node("Softmax", scores, shape=(1, 2, 3, 4), axis=-1)
    nan = sketch.node("IsNaN", p, shape=(1, 2, 3, 4), dtype=ir.DataType.BOOL)
    zero = sketch.constant(np.float32(0))
    model = sketch.returns(sketch.node("Where", nan, zero, p, shape=(1, 2, 3, 4)))
    assert check(model, ALL)["IsNaN"] == 1


@pytest.mark.parametrize(("fill", "guards"), [(-3.4e38, 0), (-np.inf, 1)])
def test_the_guard_of_a_mask_filled_at_run_time_goes_where_the_fill_is_finite(
    fill: float, guards: int
) -> None:
    sketch = Sketch(s=(1, 2, 3, 4), open=(1, 1, 3, 4))
    zero, low = sketch.constant(np.float32(0)), sketch.constant(np.float32(fill))
    seen = sketch.node("Greater", sketch["open"], zero, shape=(1, 1, 3, 4), dtype=ir.DataType.BOOL)
    mask = sketch.node("Where", seen, zero, low, shape=(1, 1, 3, 4))
    product = sketch.node("MatMul", sketch["s"], sketch.constant(np.eye(4, dtype=np.float32)), shape=(1, 2, 3, 4))  # fmt: skip
    p = sketch.node("Softmax", sketch.node("Add", product, mask, shape=(1, 2, 3, 4)), shape=(1, 2, 3, 4), axis=-1)  # fmt: skip
    nan = sketch.node("IsNaN", p, shape=(1, 2, 3, 4), dtype=ir.DataType.BOOL)
    model = sketch.returns(sketch.node("Where", nan, zero, p, shape=(1, 2, 3, 4)))
    assert check(model, SIMPLIFY)["IsNaN"] == guards


def test_a_bias_or_norm_weight_that_happens_to_be_neutral_stays() -> None:
    sketch = Sketch(x=(2, 3))
    biased = sketch.node("Add", sketch["x"], sketch.constant(np.zeros(3, np.float32)), shape=(2, 3))
    model = sketch.returns(
        sketch.node("Mul", biased, sketch.constant(np.ones(3, np.float32)), shape=(2, 3))
    )
    assert check(model, ALL) == {"Add": 1, "Mul": 1}


def rotary(heads: int, tokens: int = 5, dim: int = 8, *, swapped: bool = False) -> ir.Model:
    half = (1, tokens, heads, dim // 2)
    sketch = Sketch(x=(1, tokens, heads * dim), angle=(1, tokens, 1, dim // 2))
    cos = sketch.node("Cos", sketch["angle"], shape=(1, tokens, 1, dim // 2))
    sin = sketch.node("Sin", sketch["angle"], shape=(1, tokens, 1, dim // 2))
    x = sketch.reshape(sketch["x"], 1, tokens, heads, dim)
    a, b = sketch.node("Split", x, shape=half, outputs=2, axis=3, num_outputs=2)

    def times(u: ir.Value, v: ir.Value) -> ir.Value:
        product: ir.Value = sketch.node("Mul", u, v, shape=half)
        return product

    first = sketch.node("Sub", times(a, cos), times(b, sin), shape=half)
    second = sketch.node("Add", times(b, cos), times(a, sin), shape=half)
    parts = (second, first) if swapped else (first, second)
    turned = [sketch.transpose(part, 3, 1, 2, 0) for part in parts]
    joined = sketch.node("Concat", *turned, shape=(dim, tokens, heads, 1), axis=0)
    return sketch.returns(sketch.transpose(joined, 3, 2, 1, 0))


def test_rotations_are_one_operator() -> None:
    found = check(rotary(3), ALL)
    assert found["RotaryEmbedding"] == 1 and found["Mul"] == 0 and found["Transpose"] == 1


def test_halves_the_other_way_round_are_no_rotation() -> None:
    assert check(rotary(3, swapped=True), ALL)["RotaryEmbedding"] == 0


def attention(
    *, shared: int, mask: str, batch: int = 1, groups: int = 2, queries: int = 3, keys: int = 4, dim: int = 8
) -> ir.Model:  # fmt: skip
    """As eager code is exported: keys repeated by Expand, transposed, the scale split over both operands."""
    heads, scores = groups * shared, (batch, groups * shared, queries, keys)
    sketch = Sketch(
        q=(batch, queries, heads * dim), k=(batch, keys, groups * dim), v=(batch, keys, groups * dim),
        m=(1, 1, queries, keys),
    )  # fmt: skip

    def repeated(value: ir.Value) -> ir.Value:
        value = sketch.reshape(value, batch, keys, groups, 1, dim)
        shape = (batch, keys, groups, shared, dim)
        target = sketch.constant(np.array(shape, np.int64))
        value = sketch.node("Expand", value, target, shape=shape)
        return sketch.reshape(value, batch, keys, heads, dim)

    q = sketch.transpose(sketch.reshape(sketch["q"], batch, queries, heads, dim), 0, 2, 1, 3)
    k, v = repeated(sketch["k"]), sketch.transpose(repeated(sketch["v"]), 0, 2, 1, 3)
    k = sketch.transpose(k, 0, 2, 3, 1)
    half = sketch.constant(np.float32(0.5))
    q = sketch.node("Mul", q, half, shape=(batch, heads, queries, dim))
    k = sketch.node("Mul", k, half, shape=(batch, heads, dim, keys))
    s = sketch.node("MatMul", q, k, shape=scores)
    if mask == "where":
        zero, low = sketch.constant(np.float32(0)), sketch.constant(np.float32(-3.4e38))
        seen = sketch.node(
            "Greater", sketch["m"], zero, shape=(1, 1, queries, keys), dtype=ir.DataType.BOOL
        )
        s = sketch.node("Where", seen, s, low, shape=scores)
    elif mask == "add":
        s = sketch.node("Add", s, sketch["m"], shape=scores)
    p = sketch.node("Softmax", s, shape=scores, axis=-1)
    out = sketch.node("MatMul", p, v, shape=(batch, heads, queries, dim))
    return sketch.returns(
        sketch.reshape(sketch.transpose(out, 0, 2, 1, 3), batch, queries, heads * dim)
    )


@pytest.mark.parametrize("mask", ["none", "where", "add"])
@pytest.mark.parametrize("shared", [1, 3])
def test_attention_is_one_operator_without_repeated_keys(shared: int, mask: str) -> None:
    found = check(attention(shared=shared, mask=mask), ALL)
    assert found["MultiHeadAttention"] == 1
    assert found["Softmax"] == found["MatMul"] == found["Mul"] == 0
    assert found["Transpose"] <= (0 if shared == 1 else 4)


def test_a_batch_of_images_keeps_its_heads_in_place() -> None:
    found = check(attention(shared=1, mask="none", batch=2), ALL)
    assert found == {"MultiHeadAttention": 1}


def test_shared_heads_in_a_batch_are_left_as_they_are() -> None:
    model = attention(shared=2, mask="none", batch=2)
    assert check(model, ALL)["MultiHeadAttention"] == 0
    assert len(unfused_attention(model)) == 1


def test_layout_chains_become_as_short_as_possible() -> None:
    sketch = Sketch(x=(2, 3, 4))
    there_and_back = sketch.transpose(sketch.transpose(sketch["x"], 0, 2, 1), 0, 2, 1)
    flat = sketch.reshape(sketch.reshape(there_and_back, 6, 4), 2, 12)
    assert check(sketch.returns(sketch.node("Relu", flat, shape=(2, 12))), SHORTEN) == {
        "Reshape": 1, "Relu": 1,
    }  # fmt: skip


def test_a_view_names_the_factors_that_are_repeated() -> None:
    model = attention(shared=3, mask="none")
    last = next(node for node in model.graph if node.op_type == "Softmax").outputs[0].consumers()[0]
    assert last.inputs[1] is not None
    view = view_of(last.inputs[1])
    assert view is not None and view.source.name == "v"
    assert [view.size(tuple(f for f in axis if f not in view.repeated)) for axis in view.viewed] == [
        1, 2, 4, 8,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="does not cover"):
        arrange(None, view, ((),))  # type: ignore[arg-type]


def loop_stage() -> ir.Model:
    sketch = Sketch(context=(4, 4), x=(1, 4))
    weight = sketch.constant(np.full((4, 4), 0.5, np.float32))
    keys = sketch.node("MatMul", sketch["context"], weight, shape=(4, 4))
    table = sketch.transpose(keys, 1, 0)
    return sketch.returns(sketch.node("MatMul", sketch["x"], table, shape=(1, 4)), "velocity")


def test_what_no_step_changes_is_computed_once() -> None:
    sketch = Sketch(image=(4, 4))
    before = sketch.returns(sketch.node("Relu", sketch["image"], shape=(4, 4)), "context")
    image, x = np.random.default_rng(0).standard_normal((2, 4, 4)).astype(np.float32)
    context = run(before, image=image)["context"]
    expected = run(loop_stage(), context=context, x=x[:1])["velocity"]
    repeated = loop_stage()
    hoisted = hoist_invariants_(before, repeated, {"x"})
    assert hoisted.nodes == 2 and operators(repeated) == {"MatMul": 1}
    handed = run(before, image=image)
    given = {
        value.name: handed[str(value.name)] for value in repeated.graph.inputs if value.name != "x"
    }
    found = run(repeated, x=x[:1], **{str(k): v for k, v in given.items()})["velocity"]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_stage_without_invariants_stays_as_it_is() -> None:
    sketch = Sketch(x=(1, 4))
    repeated = sketch.returns(sketch.node("Relu", sketch["x"], shape=(1, 4)), "velocity")
    other = Sketch(image=(4, 4))
    before = other.returns(other.node("Relu", other["image"], shape=(4, 4)), "context")
    assert hoist_invariants_(before, repeated, {"x"}).nodes == 0
    assert [value.name for value in before.graph.outputs] == ["context"]


def test_the_engine_of_a_real_policy_has_one_operator_per_attention_norm_and_rotation(
    tiny_float_engine: Path, tiny_size: Any
) -> None:
    counts = {
        stage: operators(ir.load(tiny_float_engine / f"{stage}.onnx"))
        for stage in ("vision", "prefix", "denoise")
    }
    for gone in ("ScatterND", "Where", "IsNaN", "Softmax", "Expand", "ReduceMin"):
        assert counts["denoise"][gone] <= (gone == "Expand"), gone
    assert counts["vision"]["MultiHeadAttention"] == tiny_size.vision_layers
    assert counts["denoise"]["MultiHeadAttention"] == tiny_size.layers
    assert counts["denoise"]["SimplifiedLayerNormalization"] == 2 * tiny_size.layers + 1
    # Of the cross-attention layers, the keys and values of the constant prefix are not projected per step.
    per_layer = {"self": 7, "cross": 5}
    layers = tiny_size.layers // 2
    assert counts["denoise"]["MatMul"] == layers * sum(per_layer.values()) + 4


def test_an_engine_says_which_rules_changed_its_graphs(
    tiny_float_engine: Path, tiny_size: Any
) -> None:
    vision, prefix, denoise = read_rewrites(tiny_float_engine)
    assert [s.stage for s in (vision, prefix, denoise)] == ["vision", "prefix", "denoise"]
    assert vision.applied["fuse attention"] == tiny_size.vision_layers
    assert denoise.applied["fuse attention"] == tiny_size.layers
    assert vision.unfused_attention == prefix.unfused_attention == denoise.unfused_attention == ()
    assert "rewrites.json" in read_manifest(tiny_float_engine).files
