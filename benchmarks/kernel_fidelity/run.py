"""How close can two programs that compute with the same integers be? Chunks of two engines and three references.

    quantvla export build/demo/quantized --kernels onnxruntime -o build/engines/w4a8-stock
    python benchmarks/kernel_fidelity/run.py --engine build/demo/engines/w4a8 --stock build/engines/w4a8-stock \
        --policy.path examples/metaworld/policy

- engine: the project's own kernels
- engine, float32 attention: the same with float32 products in its attentions, as on processors without bfloat16
- stock: ``MatMulNBits`` of ONNX Runtime, the same integers
- operators: the same graphs in ONNX Runtime with every ``MatMulNBits`` written out in standard operators
  (block maximum, rounding, exact integer products in float32, scaling, sum): same float code upstream
- torch: the reference arithmetic of `quantvla.quantizer` in lerobot's policy
- torch, oneDNN off: the same program with PyTorch's other float32 matrix product

Every pair without "engine" differs by float rounding alone, about 1e-7 relative, until that moves an activation across a rounding
boundary of int8; from there on the chunks differ by a share of the quantization error. Writes ``result.json`` beside this file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from quantvla import staged
from quantvla.calib_sets import limit
from quantvla.calib_sets.bundled import bundled_set
from quantvla.calibrate import frame_noise
from quantvla.checkpoint import install_
from quantvla.export.graphs import save_graph
from quantvla.export.integers import integer_sites
from quantvla.export.kernels import site_name
from quantvla.families import load_policy
from quantvla.families.base import LoadedPolicy
from quantvla.quantizer import INT8_MAX, QuantizedWeight
from quantvla.runtime import kernels
from quantvla.runtime.files import sha256_file
from quantvla.runtime.manifest import MANIFEST_FILE
from quantvla.runtime.policy import Policy

Array = NDArray[np.float32]
IN_FLOAT = "engine, float32 attention"


def write_operators(engine: Path, output: Path) -> None:
    """Copy ``engine`` to ``output`` with every ``MatMulNBits`` written out in standard operators."""
    shutil.copytree(engine, output)
    manifest = json.loads((output / MANIFEST_FILE).read_text())
    with Policy.from_pretrained(engine) as policy:
        weights = {site.site: site.weight for site in integer_sites(engine, policy.manifest)}
    replaced = 0
    for stage in manifest["stages"]:
        model = ir.load(engine / stage["file"])
        for node in [node for node in model.graph if node.op_type == "MatMulNBits"]:
            write_out_(model, node, weights[site_name(node)])
            replaced += 1
        RemoveUnusedNodesPass()(model)
        save_graph(model, output / stage["file"])
    if replaced != len(weights):
        sys.exit(
            f"--stock {engine}: {replaced} of {len(weights)} linears are MatMulNBits; export it with --kernels onnxruntime"
        )
    loop = manifest.pop("loop")  # the graph of all steps still has the kernels
    kept = [name for name in manifest["files"] if not name.startswith(f"{loop['name']}.")]
    manifest["files"] = {name: sha256_file(output / name) for name in kept}
    (output / MANIFEST_FILE).write_text(json.dumps(manifest))


def write_out_(model: ir.Model, node: ir.Node, weight: QuantizedWeight) -> None:
    """Replace one kernel: x (..., in) -> (..., out), products of codes exact in float32."""
    graph, prefix = model.graph, f"{node.outputs[0].name}.operators"
    rows, columns = weight.codes.shape
    blocks = columns // weight.block
    counter = itertools.count()

    def constant(value: NDArray[Any]) -> ir.Value:
        name = f"{prefix}.{next(counter)}"
        stored = ir.Value(name=name, const_value=ir.tensor(value, name=name))
        graph.register_initializer(stored)
        return stored

    def apply(operator: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        new = ir.node(operator, inputs, attributes=attributes)
        new.outputs[0].name = f"{prefix}.{next(counter)}"
        graph.insert_before(node, new)
        return new.outputs[0]

    x, axis = node.inputs[0], np.array([-1], np.int64)
    leading = apply("Slice", apply("Shape", x), constant(np.array([0])), constant(axis))
    split = apply("Reshape", x, constant(np.array([-1, blocks, weight.block])))
    largest = apply("ReduceMax", apply("Abs", split), constant(axis), keepdims=1)
    top = constant(np.array(INT8_MAX, np.float32))
    positive = apply("Max", largest, constant(np.array(1e-30, np.float32)))
    codes = apply("Round", apply("Mul", split, apply("Div", top, positive)))
    stored = weight.codes.view(rows, blocks, weight.block).permute(1, 2, 0).contiguous()
    dots = apply(
        "MatMul", apply("Transpose", codes, perm=[1, 0, 2]), constant(stored.float().numpy())
    )
    scale = apply("Transpose", apply("Div", largest, top), perm=[1, 0, 2])
    weight_scale = constant(weight.scales.float().t()[:, None, :].contiguous().numpy())
    scaled = apply("Mul", apply("Mul", dots, scale), weight_scale)
    total = apply("ReduceSum", scaled, constant(np.array([0])), keepdims=0)
    if len(node.inputs) > 5 and node.inputs[5] is not None:
        total = apply("Add", total, node.inputs[5])
    shape = apply("Concat", leading, constant(np.array([rows])), axis=0)
    out = apply("Reshape", total, shape)
    node.outputs[0].replace_all_uses_with(out)
    graph.remove(node, safe=True)


def engine_chunks(engine: Path, frames: Sequence[dict[str, object]], seed: int) -> Array:
    """Return normalized chunks (frames, horizon, dim) of an engine."""
    with Policy.from_pretrained(engine) as policy:
        manifest = policy.manifest
        keys, shape, dim = (
            policy.preprocessor.keys,
            manifest.sampler.noise_shape,
            manifest.action.dim,
        )
        return np.stack(
            [
                policy.predict(
                    {key: frame[key] for key in frame if key in keys},
                    noise=frame_noise(seed, index, shape),
                ).normalized[0, :, :dim]
                for index, frame in enumerate(frames)
            ]
        )


def torch_chunks(loaded: LoadedPolicy, frames: Sequence[dict[str, object]], seed: int) -> Array:
    """Return normalized chunks (frames, horizon, dim) of a policy in torch, stage by stage."""
    preprocess = staged.make_preprocessor(loaded.interface)
    shape, dim = loaded.interface.sampler.noise_shape, loaded.interface.action.dim
    chunks = []
    for index, frame in enumerate(frames):
        context = staged.run_context(loaded, staged.prepare(preprocess, frame))
        chunk = staged.sample(loaded, context, frame_noise(seed, index, shape))
        chunks.append(chunk[0, :, :dim])
    return np.stack(chunks)


def main() -> None:
    """Run all programs on the same observations and noise, and print and write every pair's difference."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", type=Path, required=True, help="W4A8 engine of the policy")
    parser.add_argument("--stock", type=Path, required=True, help="its --kernels onnxruntime twin")
    parser.add_argument("--policy.path", dest="policy", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with Policy.from_pretrained(arguments.engine) as policy:
        manifest = policy.manifest
        weights = {s.site: s.weight for s in integer_sites(arguments.engine, manifest)}
    source = bundled_set(manifest.cameras, manifest.state)
    heldout = limit(source, heldout_frames=arguments.frames, seed=arguments.seed).part("heldout")
    frames = [frame.observation for frame in heldout]
    chunks = {
        name: engine_chunks(path, frames, arguments.seed)
        for name, path in (("engine", arguments.engine), ("stock", arguments.stock))
    }
    with kernels.float_attention():
        chunks[IN_FLOAT] = engine_chunks(arguments.engine, frames, arguments.seed)
    with TemporaryDirectory() as work:
        operators = Path(work) / "operators"
        write_operators(arguments.stock, operators)
        chunks["operators"] = engine_chunks(operators, frames, arguments.seed)
    loaded = load_policy(arguments.policy)
    exact = torch_chunks(loaded, frames, arguments.seed)
    install_(loaded.policy, weights)
    chunks["torch"] = torch_chunks(loaded, frames, arguments.seed)
    with torch.backends.mkldnn.flags(enabled=False):
        chunks["torch, oneDNN off"] = torch_chunks(loaded, frames, arguments.seed)
    quantization = float(np.sqrt(np.square(chunks["engine"] - exact).mean()))
    pairs = []
    for first, second in itertools.combinations(chunks, 2):
        difference = np.abs(chunks[first] - chunks[second])
        pairs.append(
            {
                "pair": [first, second],
                "max_abs": float(difference.max()),
                "rms": float(np.sqrt(np.square(difference).mean())),
                "share_below_1e-3": float((difference < 1e-3).mean()),
            }
        )
        print(
            f"{first:10s} - {second:20s} max {pairs[-1]['max_abs']:.1e}  rms {pairs[-1]['rms']:.1e}"
        )
    result = {"frames": len(frames), "quantization_rms": quantization, "pairs": pairs}
    print(f"quantization error, RMS: {quantization:.1e}")
    (Path(__file__).parent / "result.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
