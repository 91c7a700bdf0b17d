"""Activation scales fixed at calibration against scales computed at run time, for 8-bit products in ONNX Runtime.

    python benchmarks/cpu/static_scales.py benchmarks/cpu/static_scales.json

One thread, shapes of full-size SmolVLA, in turns. ``dynamic``: DynamicQuantizeMatMul. ``static``: QuantizeLinear, then
MatMulIntegerToFloat, which is what ONNX Runtime makes of fixed scales with a float result.
``static, uint8 result``: QuantizeLinear, QLinearMatMul, DequantizeLinear. ``own``: the project's kernel of
w8a8, a scale for every token and block.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from kernels import SHAPES, linear
from onnx import TensorProto, helper, numpy_helper
from roofline import best_s, product

from quantvla.runtime.kernels import available
from quantvla.runtime.machine import processor

ROUNDS = 60
OWN_BLOCKS = (320, 256, 240, 192, 128)
MS = "com.microsoft"


def static(x: Any, weight: Any, *, integer_result: bool) -> Callable[[], object]:
    """Return a call of the product of ``x`` (rows, in) and ``weight`` (in, out) int8 with fixed scales."""
    constants = {
        "w": weight, "xs": np.float32(np.ptp(x) / 255), "xz": np.uint8(128),
        "ws": np.full(weight.shape[1], 0.01, np.float32), "wz": np.zeros(weight.shape[1], np.int8),
        "ys": np.float32(0.5), "yz": np.uint8(128),
    }  # fmt: skip
    nodes = [helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["q"])]
    if integer_result:
        inputs = ["q", "xs", "xz", "w", "ws", "wz", "ys", "yz"]
        nodes.append(helper.make_node("QLinearMatMul", inputs, ["r"]))
        nodes.append(helper.make_node("DequantizeLinear", ["r", "ys", "yz"], ["y"]))
    else:
        inputs = ["q", "w", "xs", "ws", "xz", "wz"]
        nodes.append(helper.make_node("MatMulIntegerToFloat", inputs, ["y"], domain=MS))
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes, "static", [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (len(x), weight.shape[1]))],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items() if n in used],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options)
    return lambda: session.run(None, {"x": x})


def main() -> None:
    """Measure, print and write."""
    found = available()
    rows = []
    for shape in SHAPES:
        rng = np.random.default_rng(0)
        x = rng.standard_normal(shape[:2], np.float32)
        weight = rng.integers(-127, 128, shape[1:], np.int8)
        scales = np.full(shape[2], 0.01, np.float32)
        calls: dict[str, Callable[[], object]] = {
            "dynamic": product(1, "DynamicQuantizeMatMul", MS, [weight, scales], x),
            "static": static(x, weight, integer_result=False),
            "static, uint8 result": static(x, weight, integer_result=True),
        }
        if found.library is not None:
            block = next(block for block in OWN_BLOCKS if shape[1] % block == 0)
            library = ctypes.CDLL(str(found.library))
            calls["own"] = linear(library, found.linear, shape, 8, block)
        times = best_s(list(calls.values()), ROUNDS, time.thread_time)
        row = {name: round(s * 1e6, 1) for name, s in zip(calls, times, strict=True)}
        rows.append({"shape": shape, "us": row})
        print(shape, row, f"static takes {row['static'] / row['dynamic']:.2f} of dynamic's time")
    result = {"processor": processor(), "kernels": found.describe(), "onnxruntime": version("onnxruntime"), "rows": rows}  # fmt: skip
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
