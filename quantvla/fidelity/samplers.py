"""The arms of a comparison behind the same few calls: prepare an observation once, sample it many times."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quantvla.evaluate.arms import Arm
from quantvla.runtime.errors import explain
from quantvla.runtime.manifest import ActionSpec, CameraSpec, EulerSampler, VectorSpec
from quantvla.runtime.policy import Policy
from quantvla.runtime.processing_steps import FeatureStatistics, PostprocessStep
from quantvla.runtime.sampler import Observer, euler_integrate

Array = NDArray[np.float32]
Tensors = Mapping[str, NDArray[Any]]


class Described(Protocol):
    """What a manifest and a loaded policy's interface both say about a policy."""

    @property
    def cameras(self) -> tuple[CameraSpec, ...]: ...
    @property
    def state(self) -> VectorSpec: ...
    @property
    def action(self) -> ActionSpec: ...
    @property
    def sampler(self) -> EulerSampler: ...
    @property
    def statistics(self) -> dict[str, FeatureStatistics]: ...
    @property
    def postprocess(self) -> tuple[PostprocessStep, ...]: ...


class ChunkSampler(Protocol):
    """A policy taken apart: the stages before the sampler, and the velocity field."""

    @property
    def description(self) -> Described:
        """What the policy reads and makes."""
        ...

    def prepare(self, frame: Mapping[str, object]) -> Tensors:
        """Return the context of an observation, which serves any number of noises."""
        ...

    def velocity(self, context: Tensors, x: Array, t: float) -> Array:
        """Return the velocity at ``x`` (1, horizon, padded) and time ``t``."""
        ...


def sample(
    policy: ChunkSampler, context: Tensors, noise: Array, observe: Observer | None = None
) -> Array:
    """Return the normalized chunk without padding, (horizon, dim), from ``noise`` (1, horizon, padded)."""
    description = policy.description
    final = euler_integrate(
        lambda x, t: policy.velocity(context, x, t),
        noise,
        description.sampler.timesteps,
        description.sampler.step,
        observe,
    )
    return description.action.of(final)


@contextmanager
def open_sampler(arm: Arm, *, threads: int) -> Iterator[ChunkSampler]:
    """Load an arm: an engine in its runtime, a checkpoint (float or quantized) in the torch reference.

    Raises `QuantVLAError` for a checkpoint where the compiler is not installed.
    """
    if arm.kind == "engine":
        with Policy.from_pretrained(arm.path, threads=threads) as policy:
            yield EngineSampler(policy)
        return
    if importlib.util.find_spec("lerobot") is None:
        raise explain(
            arm.path,
            "a checkpoint needs lerobot, which is not installed",
            remedy="run `pip install quantvla[compile]`, or compare its engine",
        )
    yield StagedSampler(Path(arm.path), quantized=arm.kind == "quantized", threads=threads)


class EngineSampler:
    """An engine directory in its runtime."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    @property
    def description(self) -> Described:
        """The engine's manifest."""
        return self._policy.manifest

    def prepare(self, frame: Mapping[str, object]) -> Tensors:
        """Preprocess and run the stages before the sampler."""
        keys = self._policy.preprocessor.keys
        return self._policy.prepare({k: v for k, v in frame.items() if k in keys})

    def velocity(self, context: Tensors, x: Array, t: float) -> Array:
        """Run the sampler's stage once."""
        return self._policy.velocity(context, x, t)


class StagedSampler:
    """A checkpoint in torch, stage by stage; integer linears of a quantized one in the reference arithmetic."""

    def __init__(self, directory: Path, *, quantized: bool, threads: int) -> None:
        import torch

        from quantvla import staged
        from quantvla.checkpoint import load_quantized
        from quantvla.families import load_policy

        torch.set_num_threads(threads)
        self._staged = staged
        self._loaded = load_quantized(directory)[0] if quantized else load_policy(directory)
        self._preprocess = staged.make_preprocessor(self._loaded.interface)

    @property
    def description(self) -> Described:
        """The policy's interface."""
        return self._loaded.interface

    def prepare(self, frame: Mapping[str, object]) -> Tensors:
        """Preprocess and run the stages before the sampler."""
        return self._staged.run_context(self._loaded, self._staged.prepare(self._preprocess, frame))

    def velocity(self, context: Tensors, x: Array, t: float) -> Array:
        """Run the sampler's stage once."""
        return self._staged.velocity(self._loaded, context, x, t)
