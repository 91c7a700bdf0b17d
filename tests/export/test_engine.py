from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from msgspec import structs

from quantvla.checkpoint import load_quantized, with_names
from quantvla.export.engine import export_engine
from quantvla.export.integers import integer_sites
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.files import sha256_tree
from quantvla.runtime.manifest import VectorSpec, read_manifest


def graphs(engine: Path) -> dict[str, onnx.ModelProto]:
    return {stage.name: onnx.load(engine / stage.file) for stage in read_manifest(engine).stages}


def test_every_planned_site_is_an_integer_kernel_with_int8_activations(
    tiny_quantized: Path, tiny_integer_engine: Path
) -> None:
    _, card = load_quantized(tiny_quantized)
    found = {}
    for model in graphs(tiny_integer_engine).values():
        for node in model.graph.node:
            if node.op_type == "MatMulNBits":
                attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
                assert attributes["bits"] == 4 and attributes["accuracy_level"] == 4
                found[node.input[1].removesuffix(".rows")] = attributes["block_size"]
    assert found == {f"policy.{e.site}.qweight": e.scheme.block for e in card.plan.quantized}


def test_no_float_copy_of_a_quantized_weight_is_left(
    tiny_quantized: Path, tiny_integer_engine: Path
) -> None:
    loaded, card = load_quantized(tiny_quantized)
    shapes = {(e.out_features, e.in_features) for e in card.plan.quantized}
    shapes |= {shape[::-1] for shape in shapes}
    dequantized = {}
    for entry in card.plan.quantized:
        module: Any = loaded.policy.get_submodule(entry.site)
        dequantized[entry.site] = module.quantized.dequantize().numpy()
    for model in graphs(tiny_integer_engine).values():
        for tensor in model.graph.initializer:
            if (
                tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
                and tuple(tensor.dims) in shapes
            ):
                value = onnx.numpy_helper.to_array(tensor).astype(np.float32)
                for weight in dequantized.values():
                    for candidate in (weight, weight.T):
                        assert (
                            candidate.shape != value.shape or np.abs(candidate - value).max() > 1e-3
                        )


def test_integers_survive_the_export_and_scales_are_stored_in_half(
    tiny_quantized: Path, tiny_integer_engine: Path
) -> None:
    loaded, card = load_quantized(tiny_quantized)
    sites = {
        site.site: site
        for site in integer_sites(tiny_integer_engine, read_manifest(tiny_integer_engine))
    }
    assert sites.keys() == {entry.site for entry in card.plan.quantized}
    for entry in card.plan.quantized:
        module: Any = loaded.policy.get_submodule(entry.site)
        found = sites[entry.site]
        assert torch.equal(found.weight.codes, module.quantized.codes)
        assert torch.equal(found.weight.scales, module.quantized.scales)
        assert found.stored_bytes == entry.bytes_after


def test_the_engine_is_a_closed_directory(tiny_integer_engine: Path) -> None:
    manifest = read_manifest(tiny_integer_engine)
    present = {path.name for path in tiny_integer_engine.iterdir()}
    assert present == {*manifest.files, "manifest.json"}
    for model in graphs(tiny_integer_engine).values():
        assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
    for name in ("manifest.json", *manifest.files):
        assert (
            str(Path(__file__).parents[2]).encode() not in (tiny_integer_engine / name).read_bytes()
        )


def test_same_checkpoint_same_engine(
    tiny_quantized: Path, tiny_integer_engine: Path, tmp_path: Path
) -> None:
    export_engine(tiny_quantized, "cpu", tmp_path / "again")
    assert sha256_tree(tmp_path / "again") == sha256_tree(tiny_integer_engine)


def test_a_failed_export_keeps_the_old_engine(
    tiny_quantized: Path, tiny_integer_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Path(shutil.copytree(tiny_integer_engine, tmp_path / "engine"))

    def fail(*_: object) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr("quantvla.export.stages.export_graph", fail)
    with pytest.raises(RuntimeError):
        export_engine(tiny_quantized, "cpu", old, overwrite=True)
    assert sha256_tree(old) == sha256_tree(tiny_integer_engine)
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_unknown_target_and_existing_output(tiny_quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantVLAError, match="target 'gpu': unknown; did you mean 'cpu'"):
        export_engine(tiny_quantized, "gpu", tmp_path / "out")
    with pytest.raises(QuantVLAError, match="already exists"):
        export_engine(tiny_quantized, "cpu", tmp_path)


def test_names_of_state_and_action_come_from_the_robot_of_the_calibration_set(
    tiny_quantized: Path,
) -> None:
    loaded, card = load_quantized(tiny_quantized)
    interface, robot = loaded.interface, card.calibration.robot
    assert robot.state.dim == interface.state.dim
    joints = tuple(f"joint_{i}" for i in range(interface.state.dim))
    motors = tuple(f"motor_{i}" for i in range(interface.action.dim))
    named = with_names(
        loaded,
        structs.replace(
            robot,
            state=structs.replace(robot.state, names=joints),
            action=VectorSpec(key="action", dim=interface.action.dim, names=motors),
        ),
    ).interface
    assert (named.state.names, named.action.names) == (joints, motors)
    other = VectorSpec(key="action", dim=interface.action.dim + 1, names=("a", "b"))
    assert with_names(loaded, structs.replace(robot, action=other)).interface.action.names == ()
