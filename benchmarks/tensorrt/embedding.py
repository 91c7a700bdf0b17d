"""Plan size of a token embedding alone, in half precision, int8 and int4, built by tensorrt_rtx for SM89.

    python benchmarks/tensorrt/embedding.py        # SmolVLA's table, 49280 x 960; writes embedding.json

The rows are random: numbers do not change a plan's size.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from quantvla.export.graphs import save_graph
from quantvla.export.tensorrt_engine import lower_graph_
from quantvla.runtime.tensorrt_library import BuildMessages, load_library, make_logger
from quantvla.target_plan import EMBEDDINGS

TOKENS = 48


class Built(msgspec.Struct):
    """A plan of one table; ``layers``: kernels in it, one when nothing widens the table first."""

    embedding: str
    rows: int
    width: int
    plan_bytes: int
    layers: int


def graph(rows: int, width: int) -> ir.Model:
    """Return a graph that looks up ``TOKENS`` rows of a random table."""
    table = np.random.default_rng(0).standard_normal((rows, width), np.float32)
    made = helper.make_graph(
        [helper.make_node("Gather", ["table", "ids"], ["y"])], "embedding",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [1, TOKENS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, TOKENS, width])],
        [numpy_helper.from_array(table, "table")],
    )  # fmt: skip
    opset = [helper.make_opsetid("", 21)]
    return ir.from_proto(helper.make_model(made, opset_imports=opset, ir_version=10))


def build(rows: int, width: int, embedding: str) -> Built:
    """Build the table in one format."""
    library, messages = load_library("tensorrt_rtx"), BuildMessages()
    trt, logger = library.trt, make_logger(library, messages)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    model = graph(rows, width)
    lower_graph_(model, {}, "fp16", frozenset(), embedding=embedding)
    with TemporaryDirectory() as directory:
        path = Path(directory) / "embedding.onnx"
        save_graph(model, path)
        assert trt.OnnxParser(network, logger).parse_from_file(str(path))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    plan = bytes(builder.build_serialized_network(network, config))
    return Built(embedding, rows, width, len(plan), messages.layers.count("\nName: __myl"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the three and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=49280)
    parser.add_argument("--width", type=int, default=960)
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(__file__).with_name("embedding.json")
    )
    options = parser.parse_args(arguments)
    built = [build(options.rows, options.width, embedding) for embedding in EMBEDDINGS]
    data = msgspec.json.format(msgspec.json.encode(built), indent=1) + b"\n"
    options.output.write_bytes(data)
    for one in built:
        print(f"{one.embedding}: {one.plan_bytes / 2**20:.1f} MiB, {one.layers} kernels")


if __name__ == "__main__":
    main()
