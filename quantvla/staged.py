"""The policy run stage by stage in torch, on the runtime's own preprocessing and sampler.

What calibration observes and what the engine is verified against: the same tensors, in the same
order, as the engine computes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from quantvla.families.base import Interface, LoadedPolicy, Stage
from quantvla.runtime.preprocess import Preprocessor
from quantvla.runtime.processing_steps import Tokenize
from quantvla.runtime.sampler import Observer, euler_integrate

Tensors = dict[str, NDArray[Any]]
Array = TypeVar("Array", NDArray[Any], torch.Tensor)


def make_preprocessor(interface: Interface) -> Preprocessor:
    """Return the runtime's preprocessing for a policy that is not an engine yet."""
    with TemporaryDirectory() as directory:
        for name, content in interface.files.items():
            (Path(directory) / name).write_bytes(content)
        return Preprocessor(
            interface.preprocess,
            interface.statistics,
            directory,
            cameras=interface.cameras,
            state=interface.state,
        )


def prepare(preprocess: Preprocessor, observation: Mapping[str, object]) -> Tensors:
    """Preprocess a recorded observation; cameras that the policy does not use are left out."""
    return preprocess({key: value for key, value in observation.items() if key in preprocess.keys})


def run_stage(stage: Stage, tensors: Mapping[str, NDArray[Any]]) -> Tensors:
    """Run one stage on named arrays and return its named outputs."""
    inputs = {spec.name: as_tensor(tensors[spec.name]) for spec in stage.inputs}
    with torch.inference_mode():
        return {name: value.numpy() for name, value in stage_tensors(stage, inputs).items()}


def stage_tensors(stage: Stage, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run one stage on named tensors and return its named outputs; gradients flow where they are asked for."""
    outputs = stage.module(*(tensors[spec.name] for spec in stage.inputs))
    if isinstance(outputs, torch.Tensor):
        outputs = (outputs,)
    return {spec.name: value for spec, value in zip(stage.outputs, outputs, strict=True)}


def as_tensor(array: NDArray[Any]) -> torch.Tensor:
    """Return the array as a tensor, without a copy where it is contiguous."""
    return torch.from_numpy(np.ascontiguousarray(array))


def run_context(loaded: LoadedPolicy, tensors: Mapping[str, NDArray[Any]]) -> Tensors:
    """Run all stages before the sampler; return everything known by name."""
    known = dict(tensors)
    for stage in loaded.stages:
        if stage.name != loaded.interface.sampler.stage:
            known.update(run_stage(stage, known))
    return known


def velocity(
    loaded: LoadedPolicy, context: Mapping[str, NDArray[Any]], x: NDArray[np.float32], t: float
) -> NDArray[np.float32]:
    """Return the velocity at ``x`` (1, horizon, padded) and time ``t`` under a context."""
    sampler = loaded.interface.sampler
    known = {**context, sampler.state: x, sampler.time: np.array([t], np.float32)}
    return run_stage(loaded.stage(sampler.stage), known)[sampler.velocity]


def sample(
    loaded: LoadedPolicy,
    context: Mapping[str, NDArray[Any]],
    noise: NDArray[np.float32],
    observe: Observer | None = None,
) -> NDArray[np.float32]:
    """Integrate from ``noise`` to the normalized action chunk: (1, horizon, padded).

    ``observe`` is called with x and the velocity at each step.
    """
    sampler = loaded.interface.sampler
    return euler_integrate(
        lambda x, t: velocity(loaded, context, x, t),
        noise,
        sampler.timesteps,
        sampler.step,
        observe,
    )


def stacked(stage: Stage, calls: list[dict[str, Array]]) -> list[dict[str, Array]]:
    """Return the calls (of arrays or of tensors) as one along the stage's batch axes, if it has them."""
    if not stage.batch_axes:
        return calls
    names = [spec.name for spec in stage.inputs]
    return [
        {
            name: _joined([call[name] for call in calls], axis)
            for name, axis in zip(names, stage.batch_axes, strict=True)
        }
    ]


def _joined(parts: list[Array], axis: int) -> Array:
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts, axis)
    return np.concatenate(parts, axis)


def without_padding(loaded: LoadedPolicy, tensors: Mapping[str, NDArray[Any]]) -> Tensors:
    """Cut padded prompt positions off, so that they do not count in statistics.

    Exact: masked positions influence nothing, they only make shapes fixed.
    """
    known = dict(tensors)
    for step in loaded.interface.preprocess:
        if isinstance(step, Tokenize):
            length = int(known[step.mask].sum())
            known[step.tokens] = known[step.tokens][:, :length]
            known[step.mask] = known[step.mask][:, :length]
    return known
