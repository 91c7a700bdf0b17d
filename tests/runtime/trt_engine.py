"""A small engine for the target rtx: one linear per stage, each in a format of its own, written with onnx alone.

vision  w: (32, 64) int8 with static input scale;  prefix w: int4, block 32;  denoise w: fp16, and the
sampler's update x_next = x + step * v.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tiny_engine import make_manifest, write_tokenizer

from quantvla.runtime.files import sha256_file
from quantvla.runtime.manifest import (
    MANIFEST_FILE,
    EulerSampler,
    Manifest,
    StageSpec,
    TensorSpec,
    encode_manifest,
)
from quantvla.runtime.site_formats import FORMATS_FILE, SiteFormat, SiteFormats, encode_formats

F16, F32, INT8, INT4 = (
    TensorProto.FLOAT16,
    TensorProto.FLOAT,
    TensorProto.INT8,
    TensorProto.INT4,
)
WIDTH, TOKENS, STEPS = 64, 16, 4
NODES = {"vision": "vision.fc1", "prefix": "llm.q_proj", "denoise": "expert.up_proj"}
FORMATS = {"vision": "int8", "prefix": "int4", "denoise": "fp16"}


def _spec(name: str, *shape: int, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)  # type: ignore[arg-type]


def manifest() -> Manifest:
    """Stages vision (image -> features), prefix (features -> keys, half precision), denoise."""
    chunk = (1, TOKENS, WIDTH)
    x, keys = _spec("x", *chunk), _spec("keys", *chunk, dtype="float16")
    stages = (
        StageSpec(name="vision", file="vision.onnx", repeat=1,
                  inputs=(_spec("image", *chunk),), outputs=(_spec("features", *chunk),)),
        StageSpec(name="prefix", file="prefix.onnx", repeat=1,
                  inputs=(_spec("features", *chunk),), outputs=(keys,)),
        StageSpec(name="denoise", file="denoise.onnx", repeat=STEPS,
                  inputs=(keys, x, _spec("t", 1)),
                  outputs=(_spec("v", *chunk), _spec("x_next", *chunk))),
    )  # fmt: skip
    sampler = EulerSampler(
        stage="denoise", state="x", time="t", velocity="v",
        timesteps=tuple(1 - k / STEPS for k in range(STEPS)), step=-1 / STEPS, noise_shape=chunk,
    )  # fmt: skip
    return msgspec.structs.replace(
        make_manifest(), target="rtx", stages=stages, sampler=sampler, files={}
    )


def _cast(source: str, target: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}.cast", to=kind)


def _weights(stage: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto], str, str]:
    """Nodes and constants of the stage's weight and input, and the names of both operands."""
    node, rng = NODES[stage], np.random.default_rng(0)
    if FORMATS[stage] == "fp16":
        weight = rng.standard_normal((WIDTH, WIDTH)).astype(np.float16)
        return [], [numpy_helper.from_array(weight, "w")], "half", "w"
    codes = rng.integers(-7, 8, (WIDTH, WIDTH))
    kind = INT8 if FORMATS[stage] == "int8" else INT4
    stored = helper.make_tensor("w", kind, codes.shape, codes.flatten().tolist())
    if kind == INT4:
        scales = numpy_helper.from_array(np.full((WIDTH // 32, WIDTH), 0.02, np.float16), "s")
        nodes = [helper.make_node("DequantizeLinear", ["w", "s"], ["wd"], name=f"{node}.weight_dq", axis=0, block_size=32)]  # fmt: skip
        return nodes, [stored, scales], "half", "wd"
    constants = [
        stored,
        numpy_helper.from_array(np.full(WIDTH, 0.01, np.float16), "s"),
        numpy_helper.from_array(np.float16(0.02), "xs"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["half", "xs"], ["q"], name=f"{node}.input_q", output_dtype=INT8),
        helper.make_node("DequantizeLinear", ["q", "xs"], ["qd"], name=f"{node}.input_dq"),
        helper.make_node("DequantizeLinear", ["w", "s"], ["wd"], name=f"{node}.weight_dq", axis=1),
    ]  # fmt: skip
    return nodes, constants, "qd", "wd"


def _graph(stage: StageSpec) -> onnx.GraphProto:
    source = {"vision": "image", "prefix": "features", "denoise": "x"}[stage.name]
    result = {"vision": "features", "prefix": "keys", "denoise": "v"}[stage.name]
    nodes, constants, left, right = _weights(stage.name)
    nodes = [_cast(source, "half", F16), *nodes]
    product = result if stage.name == "prefix" else "product"
    nodes.append(helper.make_node("MatMul", [left, right], [product], name=NODES[stage.name]))
    if stage.name == "vision":
        nodes.append(_cast("product", result, F32))
    if stage.name == "denoise":
        constants.append(numpy_helper.from_array(np.float32(-1 / STEPS), "step"))
        nodes += [
            helper.make_node("Add", ["product", "keys"], ["sum"], name="sum"),
            _cast("sum", "wide", F32),
            helper.make_node("Add", ["wide", "t"], [result], name="with_time"),
            helper.make_node("Mul", [result, "step"], ["moved"], name="moved"),
            helper.make_node("Add", ["x", "moved"], ["x_next"], name="x_next.add"),
        ]
    kinds = {"float32": F32, "float16": F16}

    def values(specs: tuple[TensorSpec, ...]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(s.name, kinds[s.dtype], s.shape) for s in specs]

    return helper.make_graph(
        nodes, stage.name, values(stage.inputs), values(stage.outputs), constants
    )


def write_graph(directory: Path, stage: StageSpec) -> None:
    model = helper.make_model(
        _graph(stage), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )
    onnx.save(model, directory / stage.file)


def seal(directory: Path, made: Manifest) -> None:
    """Write the manifest with the checksums of what is there."""
    (directory / MANIFEST_FILE).unlink(missing_ok=True)
    files = {p.name: sha256_file(p) for p in sorted(directory.iterdir()) if p.is_file()}
    data = encode_manifest(msgspec.structs.replace(made, files=files))
    (directory / MANIFEST_FILE).write_bytes(data)


def write_trt_engine(directory: Path) -> Path:
    directory.mkdir(parents=True)
    made = manifest()
    for stage in made.stages:
        write_graph(directory, stage)
    sites = tuple(
        SiteFormat(node, stage, node, FORMATS[stage], WIDTH * WIDTH, "test")
        for stage, node in NODES.items()
    )
    formats = SiteFormats(
        board="rtx-4090", compute_capabilities=(89, 86, 120), activations="fp16", sites=sites
    )
    (directory / FORMATS_FILE).write_bytes(encode_formats(formats))
    write_tokenizer(directory / "tokenizer.json")
    seal(directory, made)
    return directory
