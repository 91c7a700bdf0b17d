"""How many operations a stage takes, how fast this machine multiplies matrices, and how far an engine is from that."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

STAGES = ("vision", "prefix", "denoise")
SHAPE = (512, 2048, 2048)  # of the product the ceilings are measured with: large, and in cache


def operations(path: Path) -> float:
    """Return the multiplications and additions of a graph's matrix products and convolutions."""
    total = 0
    for node in ir.load(path).graph:
        if node.op_type not in ("MatMul", "Gemm", "Conv"):
            continue
        out, weight = node.outputs[0].shape, node.inputs[1]
        left = node.inputs[0]
        assert out is not None and weight is not None and left is not None
        assert weight.shape is not None and left.shape is not None
        inner = (
            math.prod(weight.shape.numpy()[1:])
            if node.op_type == "Conv"
            else left.shape.numpy()[-1]
        )
        total += 2 * math.prod(out.numpy()) * int(inner)
    return float(total)


def ceilings(threads: int) -> tuple[float, float]:
    """Return the GOP/s of ONNX Runtime's float and dynamic 8-bit product of one large shape."""
    m, k, n = SHAPE
    rng = np.random.default_rng(0)
    x = rng.standard_normal((m, k)).astype(np.float32)
    float_weight = rng.standard_normal((k, n)).astype(np.float32)
    int8_weight = rng.integers(-127, 128, (k, n), dtype=np.int8)
    scales = np.full(n, 0.01, np.float32)
    plain = product(threads, "MatMul", "", [float_weight], x)
    dynamic = product(threads, "DynamicQuantizeMatMul", "com.microsoft", [int8_weight, scales], x)
    count = 2 * m * k * n / 1e9
    return count / best_s([plain], 20)[0], count / best_s([dynamic], 20)[0]


def best_s(
    calls: Sequence[Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Return the shortest duration of each call over so many turns, in seconds.

    Calls of one thread are better timed by ``time.thread_time``: other processes then do not count.
    """
    best = [math.inf] * len(calls)
    for _ in range(rounds):
        for index, call in enumerate(calls):
            start = clock()
            call()
            best[index] = min(best[index], clock() - start)
    return best


def product(
    threads: int, operator: str, domain: str, constants: list[Any], x: Any
) -> Callable[[], object]:
    """Return a call of ONNX Runtime's ``operator`` on ``x`` and ``constants``, the first (in, out)."""

    def value(name: str, content: Any) -> ir.Value:
        kind = ir.TensorType(ir.DataType.from_numpy(content.dtype))
        constant = ir.tensor(content, name=name)
        return ir.Value(name=name, shape=ir.Shape(content.shape), type=kind, const_value=constant)

    given = ir.Value(name="x", shape=ir.Shape(x.shape), type=ir.TensorType(ir.DataType.FLOAT))
    weights = [value(f"w{index}", content) for index, content in enumerate(constants)]
    node = ir.node(operator, [given, *weights], domain=domain)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape((x.shape[0], constants[0].shape[1]))
    graph = ir.Graph([given], node.outputs, nodes=[node], initializers=weights,
                     opset_imports={"": 21, "com.microsoft": 1})  # fmt: skip
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(
        ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString(), options
    )
    return lambda: session.run(None, {"x": x})


def roofline(
    straight: Path, row: dict[str, Any], float_gops: float, int8_gops: float
) -> dict[str, Any]:
    """Return each stage's operations and achieved GOP/s for one arm's times, and the ceilings."""
    stages = {}
    for name in STAGES:
        count = operations(straight / f"{name}.onnx") / 1e9
        stages[name] = {"gop": round(count, 2), "gops": round(count / row[f"{name}_ms"] * 1e3, 1)}
    return {"float_gops": round(float_gops, 1), "int8_gops": round(int8_gops, 1), "stages": stages}
