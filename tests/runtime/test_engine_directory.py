"""A damaged, foreign or newer engine directory is refused with a message that says so."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from tiny_engine import change_manifest, make_manifest, write_graph

from quantvla.runtime.backend import backend_for
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.manifest import MANIFEST_FILE, StageSpec, TensorSpec
from quantvla.runtime.onnxruntime_backend import OnnxRuntimeBackend
from quantvla.runtime.policy import Policy

replace = msgspec.structs.replace
VISION = make_manifest().stages[0]


def _edit_json(engine: Path, **fields: object) -> None:
    path = engine / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_not_an_engine(tmp_path: Path) -> None:
    with pytest.raises(QuantVLAError, match=r"not an engine directory \(no manifest.json\)"):
        Policy.from_pretrained(tmp_path)


def test_no_json(engine: Path) -> None:
    (engine / MANIFEST_FILE).write_text("{")
    with pytest.raises(QuantVLAError, match="is not a manifest"):
        Policy.from_pretrained(engine)


def test_newer_schema(engine: Path) -> None:
    _edit_json(engine, schema_version=99, novelty={})
    with pytest.raises(QuantVLAError, match=r"schema version newer than 1.*got 99; upgrade"):
        Policy.from_pretrained(engine)


def test_schema_zero(engine: Path) -> None:
    _edit_json(engine, schema_version=0)
    with pytest.raises(QuantVLAError, match="unknown schema version, got 0"):
        Policy.from_pretrained(engine)


def test_unknown_preprocessing_step(engine: Path) -> None:
    _edit_json(engine, preprocess=[{"kind": "images"}, {"kind": "crop", "size": 3}])
    with pytest.raises(
        QuantVLAError,
        match="unknown preprocessing step at position 1, expected one of images, resampled_images, normalize, "
        "tokenize, got 'crop'; upgrade",
    ):
        Policy.from_pretrained(engine)


def test_unknown_manifest_key(engine: Path) -> None:
    _edit_json(engine, surprise=1)
    with pytest.raises(QuantVLAError, match="unknown field `surprise`"):
        Policy.from_pretrained(engine)


def test_checksum_mismatch(engine: Path) -> None:
    with (engine / "tokenizer.json").open("a") as stream:
        stream.write(" ")
    with pytest.raises(QuantVLAError, match=r"tokenizer.json: checksum mismatch, expected .*got"):
        Policy.from_pretrained(engine)
    Policy.from_pretrained(engine, verify_checksums=False).close()


@pytest.mark.parametrize("check", [True, False])
def test_missing_graph(engine: Path, check: bool) -> None:
    (engine / "prefix.onnx").unlink()
    with pytest.raises(QuantVLAError, match=r"prefix.onnx: .*missing; copy the engine again"):
        Policy.from_pretrained(engine, verify_checksums=check)


def test_broken_graph(engine: Path) -> None:
    (engine / "prefix.onnx").write_bytes(b"no graph")
    with pytest.raises(QuantVLAError, match=r"prefix.onnx: ONNX Runtime cannot load the graph"):
        Policy.from_pretrained(engine, verify_checksums=False)


def test_missing_statistics(engine: Path) -> None:
    change_manifest(engine, statistics={})
    with pytest.raises(
        QuantVLAError, match=r"statistics of 'observation.state': 'mean' is missing"
    ):
        Policy.from_pretrained(engine)


def test_unknown_target(engine: Path) -> None:
    change_manifest(engine, target="cpuu")
    with pytest.raises(QuantVLAError, match=r"got 'cpuu'; .*did you mean 'cpu'"):
        Policy.from_pretrained(engine)
    with pytest.raises(QuantVLAError, match="manifest target: this runtime cannot run it"):
        backend_for("tpu")


def test_no_threads(engine: Path) -> None:
    with pytest.raises(QuantVLAError, match="threads: expected at least 1, got 0"):
        Policy.from_pretrained(engine, threads=0)


def _tensor(name: str, shape: tuple[int, ...], dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=name, shape=shape, dtype=dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            replace(VISION, inputs=(_tensor("images", (1, 3, 8, 12)),)),
            r"input 'images' .* float32 \[1, 3, 8, 12\], got float32 \[2, 3, 8, 12\]",
        ),
        (
            replace(VISION, outputs=(_tensor("features", (2, 3), "float16"),)),
            r"output 'features' .* expected float16 \[2, 3\], got float32 \[2, 3\]",
        ),
        (replace(VISION, inputs=()), "input 'images' .* expected none, got float32"),
        (
            replace(VISION, outputs=(*VISION.outputs, _tensor("more", (1,)))),
            r"output 'more' .* expected float32 \[1\], got none",
        ),
    ],
)
def test_graph_differs_from_the_manifest(engine: Path, stage: StageSpec, message: str) -> None:
    with pytest.raises(QuantVLAError, match=f"vision.onnx: {message}"):
        backend_for("cpu").load(engine / "vision.onnx", stage, 1)


def test_free_dimension_is_refused(engine: Path) -> None:
    import onnx

    model = onnx.load(engine / "vision.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "cameras"
    onnx.save(model, engine / "vision.onnx")
    with pytest.raises(QuantVLAError, match=r"got float32 \['cameras', 3, 8, 12\]"):
        backend_for("cpu").load(engine / "vision.onnx", VISION, 1)


def test_other_provider_is_an_error(engine: Path) -> None:
    backend = OnnxRuntimeBackend(provider="TensorrtExecutionProvider")
    with pytest.raises(QuantVLAError, match="needs the execution provider TensorrtExecution"):
        backend.load(engine / "vision.onnx", VISION, 1)


def test_write_graph_and_manifest_agree(tmp_path: Path) -> None:
    write_graph(tmp_path, VISION, [("ReduceMean", ["images", "plane"], "features")], plane=[2, 3])
    backend_for("cpu").load(tmp_path / "vision.onnx", VISION, 1)
