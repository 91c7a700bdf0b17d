"""A hand-made engine whose actions have a closed form.

vision:  images (2, 3, 8, 12) -> features (2, 3), the mean of each plane
prefix:  features, tokens, mask, state -> context (1,), a weighted sum of their means
denoise: v = RATE * x + context + t
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers

from quantvla.runtime.files import sha256_file
from quantvla.runtime.manifest import (
    MANIFEST_FILE,
    SCHEMA_VERSION,
    ActionSpec,
    CameraSpec,
    EulerSampler,
    Manifest,
    Source,
    StageSpec,
    TensorSpec,
    VectorSpec,
    encode_manifest,
    read_manifest,
)
from quantvla.runtime.processing_steps import (
    FeatureStatistics,
    Images,
    Normalize,
    Tokenize,
    Unnormalize,
)

RATE = 0.5
CAMERAS = ("observation.images.front", "observation.images.wrist")
HORIZON, PADDED, ACTION_DIM, STATE_DIM, STATE_PADDED = 4, 6, 2, 3, 5
HEIGHT, WIDTH, LENGTH = 8, 12, 6
STEPS = 10
WORDS = ("<pad>", "<unk>", "pick", "up", "the", "cup", "\n")

_FLOAT = TensorProto.FLOAT
_NAMES = {"float32": _FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}


def write_engine(directory: Path) -> Path:
    """Write the engine into ``directory`` and return it."""
    directory.mkdir(parents=True)
    manifest = make_manifest()
    vision, prefix, denoise = manifest.stages
    write_graph(directory, vision, [("ReduceMean", ["images", "plane"], "features")], plane=[2, 3])
    write_graph(directory, prefix, _prefix_nodes(), all=[0, 1], first=[0])
    write_graph(
        directory,
        denoise,
        [
            ("Mul", ["x_t", "rate"], "scaled"),
            ("Add", ["scaled", "context"], "shifted"),
            ("Add", ["shifted", "time"], "v_t"),
        ],
        rate=np.float32(RATE),
    )
    write_tokenizer(directory / "tokenizer.json")
    files = {path.name: sha256_file(path) for path in sorted(directory.iterdir())}
    write_manifest(directory, msgspec.structs.replace(manifest, files=files))
    return directory


def write_manifest(directory: Path, manifest: Manifest) -> None:
    (directory / MANIFEST_FILE).write_bytes(encode_manifest(manifest))


def change_manifest(directory: Path, **fields: object) -> Manifest:
    """Replace fields of the manifest on disk."""
    manifest = msgspec.structs.replace(read_manifest(directory), **fields)
    write_manifest(directory, manifest)
    return manifest


def context_of(tensors: dict[str, np.ndarray]) -> np.float32:
    """What the prefix stage computes."""
    text = (tensors["tokens"] * tensors["mask"]).astype(np.float32)
    return np.float32(tensors["features"].mean() + text.mean() + tensors["state"].mean())


def make_manifest() -> Manifest:
    images = TensorSpec(name="images", dtype="float32", shape=(2, 3, HEIGHT, WIDTH))
    features = TensorSpec(name="features", dtype="float32", shape=(2, 3))
    tokens = TensorSpec(name="tokens", dtype="int64", shape=(1, LENGTH))
    mask = TensorSpec(name="mask", dtype="bool", shape=(1, LENGTH))
    state = TensorSpec(name="state", dtype="float32", shape=(1, STATE_PADDED))
    context = TensorSpec(name="context", dtype="float32", shape=(1,))
    x_t = TensorSpec(name="x_t", dtype="float32", shape=(1, HORIZON, PADDED))
    t = TensorSpec(name="time", dtype="float32", shape=(1,))
    v_t = TensorSpec(name="v_t", dtype="float32", shape=(1, HORIZON, PADDED))

    def stage(
        name: str, repeat: int, inputs: Sequence[TensorSpec], output: TensorSpec
    ) -> StageSpec:
        return StageSpec(
            name=name, file=f"{name}.onnx", repeat=repeat, inputs=tuple(inputs), outputs=(output,)
        )

    return Manifest(
        schema_version=SCHEMA_VERSION,
        family="tiny",
        recipe="float",
        target="cpu",
        stages=(
            stage("vision", 1, [images], features),
            stage("prefix", 1, [features, tokens, mask, state], context),
            stage("denoise", STEPS, [x_t, t, context], v_t),
        ),
        sampler=EulerSampler(
            stage="denoise",
            state="x_t",
            time="time",
            velocity="v_t",
            timesteps=tuple(1.0 + k * (-1.0 / STEPS) for k in range(STEPS)),
            step=-1.0 / STEPS,
            noise_shape=(1, HORIZON, PADDED),
        ),
        preprocess=(
            Images(
                keys=CAMERAS,
                output="images",
                resize=(HEIGHT, WIDTH),
                pad_value=0.0,
                scale=2.0,
                offset=-1.0,
            ),
            Normalize(
                key="observation.state",
                output="state",
                mode="mean_std",
                eps=1e-8,
                pad_to=STATE_PADDED,
            ),
            Tokenize(
                key="task",
                file="tokenizer.json",
                suffix="\n",
                max_length=LENGTH,
                pad_id=0,
                tokens="tokens",
                mask="mask",
            ),
        ),
        postprocess=(Unnormalize(key="action", mode="mean_std", eps=1e-8, dim=ACTION_DIM),),
        statistics={
            "observation.state": FeatureStatistics(mean=(0.5, -1.0, 2.0), std=(1.0, 2.0, 0.5)),
            "action": FeatureStatistics(mean=(10.0, -3.0), std=(2.0, 0.1)),
        },
        cameras=tuple(CameraSpec(key=key, height=HEIGHT, width=WIDTH) for key in CAMERAS),
        state=VectorSpec(
            key="observation.state", dim=STATE_DIM, names=("shoulder", "elbow", "wrist")
        ),
        task_key="task",
        action=ActionSpec(horizon=HORIZON, execute=3, dim=ACTION_DIM),
        files={"vision.onnx": "", "prefix.onnx": "", "denoise.onnx": "", "tokenizer.json": ""},
        source=Source(checkpoint_sha256="0" * 64, policy_type="tiny"),
        versions={},
    )


def write_graph(
    directory: Path, stage: StageSpec, nodes: list[tuple[str, list[str], str]], **constants: object
) -> None:
    """Write a stage's graph of (operator, inputs, output) nodes; the last makes its output."""
    made = []
    for operator, inputs, output in nodes:
        attributes: dict[str, object] = {}
        if operator.startswith("Reduce"):
            attributes["keepdims"] = 0
        if operator == "Cast":
            attributes["to"] = _FLOAT
        made.append(helper.make_node(operator, inputs, [output], **attributes))
    graph = helper.make_graph(
        made,
        stage.name,
        [_value(spec) for spec in stage.inputs],
        [_value(spec) for spec in stage.outputs],
        [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, directory / stage.file)


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, _NAMES[spec.dtype], spec.shape)


def _prefix_nodes() -> list[tuple[str, list[str], str]]:
    return [
        ("Cast", ["tokens"], "token_values"),
        ("Cast", ["mask"], "mask_values"),
        ("Mul", ["token_values", "mask_values"], "text"),
        ("ReduceMean", ["text", "all"], "text_mean"),
        ("ReduceMean", ["features", "all"], "feature_mean"),
        ("ReduceMean", ["state", "all"], "state_mean"),
        ("Add", ["text_mean", "feature_mean"], "partial"),
        ("Add", ["partial", "state_mean"], "sum"),
        ("Unsqueeze", ["sum", "first"], "context"),
    ]


def write_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer.save(str(path))


def observation(seed: int = 0) -> dict[str, object]:
    """A valid observation of the tiny engine."""
    rng = np.random.default_rng(seed)
    images = {
        key: rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8, endpoint=False)
        for key in CAMERAS
    }
    return {
        **images,
        "observation.state": rng.standard_normal(STATE_DIM),
        "task": "pick up the cup",
    }
