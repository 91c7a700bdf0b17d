"""Token embeddings with fewer bits: what is stored, what comes out, what TensorRT makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from quantvla.export.embeddings import narrow_embeddings_
from quantvla.export.graphs import save_graph
from quantvla.export.tensorrt_engine import lower_graph_
from quantvla.runtime.errors import QuantVLAError

ROWS, WIDTH, TOKENS = 9000, 64, 8
TABLE = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)
IDS = np.array([[0, 1, 17, 8191, 8192, 8999, 5, 5]])


def graph(width: int = WIDTH) -> ir.Model:
    """y = table[ids] + positions[constant]: only the first table is of tokens."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("Gather", ["positions", "where"], ["places"]),
        helper.make_node("Add", ["rows", "places"], ["y"]),
    ]
    table = TABLE[:, :width].copy()
    inits = [
        numpy_helper.from_array(table, "table"),
        numpy_helper.from_array(np.zeros((TOKENS, width), np.float32), "positions"),
        numpy_helper.from_array(np.arange(TOKENS)[None], "where"),
    ]
    made = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [1, TOKENS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, TOKENS, width])], inits,
        value_info=[
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, TOKENS, width])
            for name in ("rows", "places")
        ],
    )  # fmt: skip
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ir.from_proto(model)


def lowered(number_format: str, path: Path) -> tuple[Path, tuple[object, ...]]:
    model = graph()
    found = lower_graph_(
        model, {}, "fp16", frozenset(), stage="prefix", embedding=number_format
    ).embeddings
    save_graph(model, path / f"{number_format}.onnx")
    return path / f"{number_format}.onnx", found


@pytest.mark.parametrize(("number_format", "error"), [("half", 1e-3), ("int8", 0.02), ("int4", 0.2)])  # fmt: skip
def test_rows_come_out_as_exact_as_their_bits(
    number_format: str, error: float, tmp_path: Path
) -> None:
    path, found = lowered(number_format, tmp_path)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    (rows,) = ort.InferenceSession(path, options).run(None, {"ids": IDS})
    off = np.linalg.norm(rows - TABLE[IDS]) / np.linalg.norm(TABLE[IDS])
    assert error / 20 < off < error
    expected = {"half": [], "int8": [ROWS * (WIDTH + 2)], "int4": [ROWS * (WIDTH // 2 + 4)]}
    assert [table.bytes for table in found] == expected[number_format]  # type: ignore[attr-defined]
    assert all(table.half_bytes == 2 * ROWS * WIDTH for table in found)  # type: ignore[attr-defined]


def test_a_table_of_broken_blocks_is_refused() -> None:
    with pytest.raises(QuantVLAError, match="table: its rows are no whole blocks of 32, got 48; use --embedding int8"):  # fmt: skip
        narrow_embeddings_(graph(width=48), "prefix", "int4", "fp16")


def test_a_table_that_other_operators_read_stays() -> None:
    model = graph()
    table = model.graph.initializers["table"]
    model.graph.append(ir.node("ReduceSum", [table]))
    assert narrow_embeddings_(model, "prefix", "int8", "fp16") == ((), frozenset())
