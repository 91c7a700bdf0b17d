"""What a family is: how its checkpoint is loaded, cut into stages, and described as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from quantvla.runtime.manifest import ActionSpec, CameraSpec, EulerSampler, TensorSpec, VectorSpec
from quantvla.runtime.processing_steps import FeatureStatistics, PostprocessStep, PreprocessStep
from quantvla.structure import EMPTY, Structure, TapAttention, no_attention


@dataclass(frozen=True)
class Site:
    """One linear layer of the policy.

    ``name`` is its module path in the policy. ``part`` (vision, connector, llm, expert, encoder,
    decoder) and ``role`` (attention, mlp, projection) are what recipes select by. ``producer`` is
    the module that writes its input where that is a norm or a linear, ``siblings`` the sites that
    read the same input. ``unused`` says why inference never reads its output ("" when it does).
    """

    name: str
    stage: str
    part: str
    role: str
    kind: str
    layer: int | None
    out_features: int
    in_features: int
    bias: bool
    producer: str | None = None
    siblings: tuple[str, ...] = ()
    unused: str = ""


@dataclass(frozen=True)
class Stage:
    """A part of the policy that becomes one graph: float32 tensors in and out, in the order of the specs.

    ``module`` shares its weights with the policy, so a site replaced there is replaced here. What
    a module below it computes from parameters once, when it is made, it computes again in ``derive_()``,
    with gradients where they are on: the policy can be trained through its stages.
    ``batch_axes``: the axis of each input along which several calls can be stacked into one in
    torch, outputs then stacked along axis 0; empty when the module takes one call at a time.
    ``attended``: its tokens are the leading keys of the sampler stage's attentions.
    """

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    repeat: int = 1
    batch_axes: tuple[int, ...] = ()
    attended: bool = False


def tensor_spec(name: str, *shape: int, dtype: Any = "float32") -> TensorSpec:
    """Return the spec of a tensor between stages."""
    return TensorSpec(name=name, dtype=dtype, shape=shape)


@dataclass(frozen=True)
class Interface:
    """What the outside of a policy looks like; goes into the engine's manifest as it is.

    ``files`` are small files the engine carries, by name (the tokenizer).
    """

    preprocess: tuple[PreprocessStep, ...]
    postprocess: tuple[PostprocessStep, ...]
    statistics: dict[str, FeatureStatistics]
    cameras: tuple[CameraSpec, ...]
    state: VectorSpec
    task_key: str
    action: ActionSpec
    sampler: EulerSampler
    files: dict[str, bytes]


PredictChunk = Callable[[Any, Mapping[str, Any], Tensor], Tensor]
"""(lerobot's policy, preprocessed batch, noise) -> normalized chunk (1, horizon, action dim)."""


def predict_from_noise(policy: Any, batch: Mapping[str, Any], noise: Tensor) -> Tensor:
    """Return the chunk of a policy that takes its noise as an argument, as most do."""
    chunk: Tensor = policy.predict_action_chunk(batch, noise=noise)
    return chunk


@dataclass(frozen=True)
class LoadedPolicy:
    """A float policy in memory, its linears, its stages and its interface.

    ``structure`` and ``tap_attention`` (see `quantvla.structure`) are what folds and attention
    corrections work with; a family without them compiles with rounding passes only.
    ``carried`` are small files that loading needs and a copy of the checkpoint would lack, by path
    relative to it (a tokenizer from elsewhere). ``processor_overrides`` are what lerobot needs to
    build the checkpoint's own preprocessor here, by step. ``stored_names`` are the names in the
    weights file of parameters that have another one there. ``predict_chunk`` has lerobot's policy
    sample a chunk from given noise.
    """

    directory: Path
    family: str
    policy: nn.Module
    sites: tuple[Site, ...]
    stages: tuple[Stage, ...]
    interface: Interface
    structure: Structure = EMPTY
    tap_attention: TapAttention = no_attention
    carried: Mapping[str, bytes] = field(default_factory=dict)
    processor_overrides: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    stored_names: Mapping[str, str] = field(default_factory=dict)
    predict_chunk: PredictChunk = predict_from_noise

    @property
    def used_sites(self) -> tuple[Site, ...]:
        """The sites whose output inference reads."""
        return tuple(site for site in self.sites if not site.unused)

    def stage(self, name: str) -> Stage:
        """Return the stage called ``name``."""
        return next(stage for stage in self.stages if stage.name == name)


@dataclass(frozen=True)
class Family:
    """One VLA architecture: ``policy_type`` of its checkpoints and the function that loads one.

    ``load(directory, absent)``: parameters named in ``absent`` may be missing from the checkpoint.
    """

    policy_type: str
    load: Callable[[Path, frozenset[str]], LoadedPolicy]


@contextmanager
def replaced(policy: nn.Module, modules: dict[str, nn.Module]) -> Iterator[None]:
    """Put ``modules`` (by module path) in the place of the policy's own while the block runs."""
    originals = {name: policy.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            policy.set_submodule(name, module)
        yield
    finally:
        for name, module in originals.items():
            policy.set_submodule(name, module)
