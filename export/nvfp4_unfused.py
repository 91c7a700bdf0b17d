"""NVFP4 for ONNX Runtime on the CPU, which computes nothing in 4-bit floats: the definition in standard operators.

Used to check the numbers of a graph whose 4-bit part only TensorRT can run. Weights are widened to
float32; the quantization of inputs becomes rounding in float32 to the same values.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

from quantvla.export.graphs import OPSET, save_graph
from quantvla.export.nvfp4 import BLOCK, DYNAMIC_QUANTIZE, E2M1_MAX, E4M3_MAX
from quantvla.export.rewrites.graph import Editor, constant, shape_of


def unfuse_file(path: Path) -> bool:
    """Rewrite the graph in ``path``, and its weights, if it computes in 4-bit floats; returns whether it did."""
    model = ir.load(path)
    if not any(node.op_type == DYNAMIC_QUANTIZE for node in model.graph):
        return False
    ir.external_data.load_to_model(model)
    unfuse_nvfp4_(model)
    save_graph(model, path)
    return True


def unfuse_nvfp4_(model: ir.Model) -> None:
    """Replace every dequantized 4-bit float of the graph by the float32 it stands for."""
    for node in list(model.graph):
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if codes is None or codes.dtype != ir.DataType.FLOAT4E2M1:
            continue
        quantize = codes.producer()
        widened = (
            _weight(Editor(model, node), codes, node.inputs[1])
            if quantize is None
            else _Rounding(Editor(model, quantize), quantize).emit()
        )
        Editor(model, node).substitute(node.outputs[0], widened)
    RemoveUnusedNodesPass()(model)
    RemoveUnusedOpsetsPass()(model)
    model.graph.opset_imports[""] = OPSET  # what the rest was written in


def _weight(editor: Editor, codes: ir.Value, steps: ir.Value | None) -> ir.Value:
    """Return the weight (in, out) widened; ``steps`` (in / 16, out) are computed from its two levels of scales."""
    inner, narrow = steps.producer() if steps is not None else None, constant(codes)
    assert inner is not None and narrow is not None
    scales, tensor_scale = (constant(value) for value in inner.inputs)
    assert scales is not None and tensor_scale is not None
    wide = np.repeat(scales.astype(np.float32) * tensor_scale, BLOCK, axis=0)
    return editor.constant(f"{codes.name}.wide", narrow.astype(np.float32) * wide)


class _Rounding:
    """Writes `quantvla.export.nvfp4.quantize_blocks` and its inverse as nodes."""

    def __init__(self, editor: Editor, quantize: ir.Node) -> None:
        x, tensor_scale = quantize.inputs
        shape = shape_of(x)
        assert x is not None and tensor_scale is not None and shape is not None
        self._editor, self._x, self._tensor_scale, self._shape = editor, x, tensor_scale, shape
        self._blocked = (*shape[:-1], shape[-1] // BLOCK, BLOCK)
        self._narrow = (*self._blocked[:-1], 1)

    def emit(self) -> ir.Value:
        """Return the input as float32, each value the nearest that its block can hold."""
        blocks = self._editor.reshape(self._cast(self._x, ir.DataType.FLOAT), self._blocked)
        steps = self._steps(blocks)
        empty = self._add("Equal", [steps, self._number(0)], ir.DataType.BOOL)
        ratio = self._add("Div", [blocks, self._add("Where", [empty, self._number(1), steps])])
        return self._editor.reshape(self._add("Mul", [self._codes(ratio), steps]), self._shape)

    def _steps(self, blocks: ir.Value) -> ir.Value:
        """Return every block's scale as E4M3 holds it, times the tensor's."""
        axes = self._editor.constant("nvfp4.axes", np.array([-1], np.int64))
        largest = self._editor.add(
            "ReduceMax", [self._add("Abs", [blocks]), axes], shape=self._narrow, keepdims=1
        )
        full = self._add("Mul", [self._tensor_scale, self._number(E2M1_MAX)], shape=())
        wanted = self._add(
            "Min", [self._add("Div", [largest, full]), self._number(E4M3_MAX)], shape=self._narrow
        )
        held = self._cast(self._cast(wanted, ir.DataType.FLOAT8E4M3FN), ir.DataType.FLOAT)
        return self._add("Mul", [held, self._tensor_scale], shape=self._narrow)

    def _codes(self, ratio: ir.Value) -> ir.Value:
        """Return the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with the sign, ties to the even code."""
        low, top = self._number(-E2M1_MAX), self._number(E2M1_MAX)
        ratio = self._add("Clip", [ratio, low, top])
        size = self._add("Abs", [ratio])
        step = self._number(0.5)
        for start, wider in ((2, 1), (4, 2)):
            above = self._add("GreaterOrEqual", [size, self._number(start)], ir.DataType.BOOL)
            step = self._add("Where", [above, self._number(wider), step])
        return self._add("Mul", [self._add("Round", [self._add("Div", [ratio, step])]), step])

    def _number(self, value: float) -> ir.Value:
        return self._editor.constant(f"nvfp4.{value:g}", np.array(value, np.float32))

    def _add(
        self, operator: str, inputs: list[ir.Value], dtype: ir.DataType = ir.DataType.FLOAT,
        shape: tuple[int, ...] | None = None,
    ) -> ir.Value:  # fmt: skip
        return self._editor.add(
            operator, inputs, shape=self._blocked if shape is None else shape, dtype=dtype
        )

    def _cast(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        return self._editor.add("Cast", [value], shape=shape_of(value), dtype=kind, to=kind.value)
