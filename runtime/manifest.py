"""The manifest of an engine directory: everything a robot needs to know, as data.

A family's knowledge ends here: the runtime executes the steps and stages listed in the manifest
and has no code per family.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec

from quantvla.runtime.errors import explain
from quantvla.runtime.files import sha256_file

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"

PositiveInt = Annotated[int, msgspec.Meta(gt=0)]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all manifest parts: immutable, and an unknown key is an error."""


class TensorSpec(_Strict, frozen=True, kw_only=True):
    """Name, numpy dtype name and fixed shape of one tensor that enters or leaves a stage."""

    name: str
    dtype: Literal["float32", "float16", "int64", "int32", "bool"]
    shape: tuple[int, ...]


class StageSpec(_Strict, frozen=True, kw_only=True):
    """One graph. Inputs are named tensors: made by preprocessing, by an earlier stage, or by the sampler.

    ``repeat`` is how many times the sampler runs it for one action chunk. ``native`` is the graph of
    the project's own operators on the same weights, "" if there is none; ``native_attention`` says that
    it has attention in bfloat16, which not every processor can run.
    """

    name: str
    file: str
    repeat: PositiveInt
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    native: str = ""
    native_attention: bool = False


class EulerSampler(_Strict, frozen=True, kw_only=True, tag_field="kind", tag="euler"):
    """Forward Euler: ``x <- x + step * velocity(x, t)`` for each ``t`` in ``timesteps``.

    ``state``, ``time`` and ``velocity`` name the tensors of the repeated stage ``stage``;
    noise is standard normal of ``noise_shape`` (1, horizon, padded action dimension).
    ``only_own_times``: the stage knows ``timesteps`` and no other time, because what depends on the
    time alone was tabulated.
    """

    stage: str
    state: str
    time: str
    velocity: str
    timesteps: tuple[float, ...]
    step: float
    noise_shape: tuple[int, ...]
    only_own_times: bool = False


class GuidanceSpec(_Strict, frozen=True, kw_only=True):
    """The optional graph for guided real-time chunking: the sampler's stage and its Jacobian in one.

    ``stage`` has the inputs of the policy's denoise step, whatever a target moved out of its own
    graph, then ``target`` (noise shape) and ``weights`` (1, horizon, 1). With
    ``e = weights * (target - (x - t v(x)))`` it gives the velocity v and, under the name
    ``correction``, ``e`` times the Jacobian of ``x - t v(x)``. Not run unless asked for.
    """

    stage: StageSpec
    target: str
    weights: str
    correction: str


class Images(_Strict, frozen=True, kw_only=True, tag_field="kind", tag="images"):
    """HWC uint8 RGB images -> ``output`` (cameras, 3, height, width) float32, in the order of ``keys``.

    Pixels / 255; bilinear resize without antialiasing that keeps the aspect ratio; padding with
    ``pad_value`` (in [0, 1]) left and top, or around the centred image; then ``scale * x + offset``.
    Resize is skipped when ``resize`` is null; ``resize`` is (height, width).
    """

    keys: tuple[str, ...]
    output: str
    resize: tuple[PositiveInt, PositiveInt] | None
    pad_value: float
    scale: float
    offset: float
    pad: Literal["top_left", "around"] = "top_left"


class Normalize(_Strict, frozen=True, kw_only=True, tag_field="kind", tag="normalize"):
    """A vector of the observation -> ``output``, normalized with the statistics of ``key``.

    Modes as in lerobot's NormalizerProcessorStep (``eps`` guards the division). The result is
    padded with zeros to ``pad_to`` and gets a leading batch axis: (1, pad_to) float32.
    """

    key: str
    output: str
    mode: Literal["identity", "mean_std", "min_max", "quantiles", "quantile10"]
    eps: float
    pad_to: PositiveInt


class StateText(_Strict, frozen=True, kw_only=True):
    """The state as text: the vector at ``key``, normalized like `Normalize`, then for each entry the number of its bin.

    ``bins`` equal bins cover [-1, 1); what lies below is -1, what lies above the last number.
    """

    key: str
    mode: Literal["identity", "mean_std", "min_max", "quantiles", "quantile10"]
    eps: float
    bins: PositiveInt


class Prompt(_Strict, frozen=True, kw_only=True):
    """How a sentence becomes the text that is tokenized.

    Stripped where ``strip``, in lower case where ``lower``, without what the regular expression
    ``drop`` matches, then every pair of ``replace``, in order; last it takes the place of
    ``{task}`` in ``template``, and the state's numbers, with spaces between, that of ``{state}``.
    """

    template: str = "{task}"
    strip: bool = False
    lower: bool = False
    drop: str = ""
    replace: tuple[tuple[str, str], ...] = ()
    state: StateText | None = None


class Tokenize(_Strict, frozen=True, kw_only=True, tag_field="kind", tag="tokenize"):
    """The task sentence -> ``tokens`` (1, max_length) int64 and ``mask`` (1, max_length) bool.

    The sentence is put into ``prompt``; ``suffix`` is appended unless the text ends with it.
    ``file`` is a `tokenizers` JSON file in the engine directory. Padded on the right with
    ``pad_id``; longer text is cut at ``max_length``.
    """

    key: str
    file: str
    suffix: str
    max_length: PositiveInt
    pad_id: int
    tokens: str
    mask: str
    prompt: Prompt = Prompt()


PreprocessStep = Images | Normalize | Tokenize


class Unnormalize(_Strict, frozen=True, kw_only=True, tag_field="kind", tag="unnormalize"):
    """Model output (1, horizon, padded) -> (horizon, dim) in physical units, statistics of ``key``."""

    key: str
    mode: Literal["identity", "mean_std", "min_max", "quantiles", "quantile10"]
    eps: float
    dim: PositiveInt


class AddState(_Strict, frozen=True, kw_only=True, tag_field="kind", tag="add_state"):
    """Actions relative to the state of their observation -> absolute ones.

    Entry i of every action gets entry i of ``tensor`` (1, at least dim), which preprocessing made,
    where ``mask`` is true; ``mask`` covers the leading entries.
    """

    tensor: str
    mask: tuple[bool, ...]


PostprocessStep = Unnormalize | AddState


class FeatureStatistics(_Strict, frozen=True, kw_only=True):
    """Per-dimension statistics of one feature, physical units; absent ones are null."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    min: tuple[float, ...] | None = None
    max: tuple[float, ...] | None = None
    q01: tuple[float, ...] | None = None
    q99: tuple[float, ...] | None = None
    q10: tuple[float, ...] | None = None
    q90: tuple[float, ...] | None = None


def command_statistics(
    steps: tuple[PostprocessStep, ...], statistics: dict[str, FeatureStatistics]
) -> FeatureStatistics | None:
    """Return the statistics of the commands that postprocessing returns.

    None where there are none: the statistics of actions relative to the state are of displacements.
    """
    first, *rest = steps
    relative = any(isinstance(step, AddState) and any(step.mask) for step in rest)
    return None if relative or not isinstance(first, Unnormalize) else statistics.get(first.key)


class CameraSpec(_Strict, frozen=True, kw_only=True):
    """A camera the policy was trained with: observation key and (height, width) of its images."""

    key: str
    height: PositiveInt
    width: PositiveInt


class VectorSpec(_Strict, frozen=True, kw_only=True):
    """A vector feature: observation key, length and the names of its entries (empty if unknown)."""

    key: str
    dim: PositiveInt
    names: tuple[str, ...] = ()


class ActionSpec(_Strict, frozen=True, kw_only=True):
    """What a chunk is: ``horizon`` steps of ``dim`` numbers, of which ``execute`` are run before the next."""

    horizon: PositiveInt
    execute: PositiveInt
    dim: PositiveInt
    names: tuple[str, ...] = ()


class Source(_Strict, frozen=True, kw_only=True):
    """Where the engine came from."""

    checkpoint_sha256: str
    policy_type: str
    calibration_sha256: str | None = None


class Manifest(_Strict, frozen=True, kw_only=True):
    """The content of ``manifest.json``."""

    schema_version: int
    family: str
    recipe: str
    target: str
    stages: tuple[StageSpec, ...]
    sampler: EulerSampler
    preprocess: tuple[PreprocessStep, ...]
    postprocess: tuple[PostprocessStep, ...]
    statistics: dict[str, FeatureStatistics]
    cameras: tuple[CameraSpec, ...]
    state: VectorSpec
    task_key: str
    action: ActionSpec
    files: dict[str, str]
    source: Source
    versions: dict[str, str]
    guidance: GuidanceSpec | None = None

    @property
    def observation_keys(self) -> frozenset[str]:
        """The keys that an observation must have: cameras, state and task."""
        return frozenset((*(c.key for c in self.cameras), self.state.key, self.task_key))


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the manifest as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of an engine directory; an older or newer schema, or an unknown step, is refused."""
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise explain(
            directory,
            f"not an engine directory (no {MANIFEST_FILE})",
            remedy="give the directory that `quantvla export` wrote",
        )
    data = path.read_bytes()
    _check_schema(path, data)
    try:
        return msgspec.json.decode(data, type=Manifest)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise explain(
            path,
            f"does not describe an engine this version can run ({error})",
            remedy="export the engine again with this version of quantvla",
        ) from error


class _Header(msgspec.Struct):
    """What is read first, so that a newer manifest is named as such and not as a broken one."""

    schema_version: int
    preprocess: list[dict[str, object]] = []


def _check_schema(path: Path, data: bytes) -> None:
    try:
        header = msgspec.json.decode(data, type=_Header)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise explain(
            path, f"is not a manifest ({error})", remedy="export the engine again"
        ) from error
    version = header.schema_version
    if version > SCHEMA_VERSION:
        raise explain(
            path,
            f"schema version newer than {SCHEMA_VERSION}, the newest this runtime knows",
            got=version,
            remedy="upgrade quantvla on this machine",
        )
    if version < 1:
        raise explain(path, "unknown schema version", got=version, remedy="export the engine again")
    known = [str(step.__struct_config__.tag) for step in get_args(PreprocessStep)]
    for position, step in enumerate(header.preprocess):
        if step.get("kind") not in known:
            raise explain(
                path,
                f"unknown preprocessing step at position {position}, expected one of "
                f"{', '.join(known)}",
                got=repr(step.get("kind")),
                remedy="upgrade quantvla on this machine",
            )


def check_files(directory: Path, manifest: Manifest) -> None:
    """Raise `QuantVLAError` if a file listed in the manifest is missing or its SHA-256 differs."""
    for name, expected in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise explain(
                path, "listed in the manifest but missing", remedy="copy the engine again"
            )
        found = sha256_file(path)
        if found != expected:
            raise explain(
                path,
                f"checksum mismatch, expected {expected[:12]}…",
                got=f"{found[:12]}…",
                remedy="copy the engine again or export it again",
            )
