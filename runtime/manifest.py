"""The manifest of an engine directory: everything a robot needs to know, as data.

A family's knowledge ends here: the runtime executes the steps and stages listed in the manifest
and has no code per family.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.errors import explain
from quantvla.runtime.files import sha256_file
from quantvla.runtime.processing_steps import (
    FeatureStatistics,
    PositiveInt,
    PostprocessStep,
    PreprocessStep,
    Strict,
)

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"


class TensorSpec(Strict, frozen=True, kw_only=True):
    """Name, numpy dtype name and fixed shape of one tensor that enters or leaves a stage."""

    name: str
    dtype: Literal["float32", "float16", "int64", "int32", "bool"]
    shape: tuple[int, ...]


class StageSpec(Strict, frozen=True, kw_only=True):
    """One graph. Inputs are named tensors: made by preprocessing, by an earlier stage, or by the sampler.

    ``repeat`` is how many times it runs for one action chunk: the last stage once a denoise step, one
    before it once, or once for each row of its inputs (each camera), outputs joined. ``native`` is
    the graph of the project's own operators on the same weights, "" if there is none.
    """

    name: str
    file: str
    repeat: PositiveInt
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    native: str = ""


class EulerSampler(Strict, frozen=True, kw_only=True, tag_field="kind", tag="euler"):
    """Forward Euler: ``x <- x + step * velocity(x, t)`` for each ``t`` in ``timesteps``.

    ``step`` is one size for all, or one for each time (a schedule fitted by `quantvla schedule`).
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
    step: float | tuple[float, ...]
    noise_shape: tuple[int, ...]
    only_own_times: bool = False

    @property
    def sizes(self) -> tuple[float, ...]:
        """The step from each time to the next, negative from noise to actions."""
        if isinstance(self.step, tuple):
            return self.step
        return (self.step,) * len(self.timesteps)


class GuidanceSpec(Strict, frozen=True, kw_only=True):
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


class CameraSpec(Strict, frozen=True, kw_only=True):
    """A camera the policy was trained with: observation key and (height, width) of its images."""

    key: str
    height: PositiveInt
    width: PositiveInt


class VectorSpec(Strict, frozen=True, kw_only=True):
    """A vector feature: observation key, length and the names of its entries (empty if unknown)."""

    key: str
    dim: PositiveInt
    names: tuple[str, ...] = ()


class ActionSpec(Strict, frozen=True, kw_only=True):
    """What a chunk is: ``horizon`` steps of ``dim`` numbers, of which ``execute`` are run before the next."""

    horizon: PositiveInt
    execute: PositiveInt
    dim: PositiveInt
    names: tuple[str, ...] = ()

    def of(self, chunk: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the actions (horizon, dim) in the model's padded ``chunk`` (1, its horizon, padded)."""
        return chunk[0, : self.horizon, : self.dim]


class SiteKernel(Strict, frozen=True, kw_only=True):
    """The operator that an integer linear was exported as, and why.

    ``median_us``: microseconds of a call by operator that computes the linear's format, as measured
    on the machine of `KernelChoices`; empty where that has not measured this shape.
    """

    site: str
    stage: str
    format: str
    shape: tuple[int, ...]
    out_features: int
    operator: str
    reason: str
    median_us: dict[str, float] = msgspec.field(default_factory=dict)


class KernelChoices(Strict, frozen=True, kw_only=True):
    """What all integer linears were exported as, in graph order; ``profile`` is the machine measured on, "" if none."""

    profile: str
    sites: tuple[SiteKernel, ...]


class Source(Strict, frozen=True, kw_only=True):
    """Where the engine came from."""

    checkpoint_sha256: str
    policy_type: str
    calibration_sha256: str | None = None


class Manifest(Strict, frozen=True, kw_only=True):
    """The content of ``manifest.json``.

    ``loop`` is the optional graph of all denoise steps: the inputs of the sampler's stage without the
    time, the state being the noise, and one output, the normalized chunk.
    """

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
    loop: StageSpec | None = None
    guidance: GuidanceSpec | None = None
    kernels: KernelChoices | None = None

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
