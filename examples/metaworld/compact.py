"""What a training run needs beside its exported weights to go on, in some hundred kilobytes.

Adam's second moments are kept as the means of their rows and columns (Adafactor, arXiv 1804.04235), the first moments
not at all: they forget within some ten steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save as encode
from torch import Tensor

from quantvla.runtime.files import write_atomic


@dataclass(frozen=True)
class State:
    """Step, training seconds, the training-only head, and Adam's second moments by parameter."""

    step: int
    trained_s: float
    head: Mapping[str, Tensor]
    second_moments: Mapping[str, Tensor]


def save(path: Path, state: State) -> None:
    """Write ``state`` to ``path``, second moments by their rows and columns, atomically."""
    tensors = {f"head:{name}": tensor.clone() for name, tensor in state.head.items()}
    for name, moment in state.second_moments.items():
        matrix = moment.reshape(len(moment), -1)
        tensors[f"rows:{name}"] = matrix.mean(dim=1)
        tensors[f"columns:{name}"] = matrix.mean(dim=0)
    numbers = {"step": str(state.step), "trained_s": repr(state.trained_s)}
    write_atomic(path, encode(tensors, metadata=numbers))


def load(path: Path, parameters: Mapping[str, Tensor]) -> State:
    """Return the state in ``path``; second moments, shaped like ``parameters``, of rank 1 as matrices."""
    with safe_open(path, framework="pt") as file:
        numbers = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    moments = {}
    for name, parameter in parameters.items():
        rows = tensors.get(f"rows:{name}")
        if rows is not None:
            scale = rows / rows.mean().clamp_min(torch.finfo(torch.float32).tiny)
            outer = scale[:, None] * tensors[f"columns:{name}"]
            moments[name] = outer.reshape(parameter.shape)
    head = {n.removeprefix("head:"): t for n, t in tensors.items() if n.startswith("head:")}
    return State(int(numbers["step"]), float(numbers["trained_s"]), head, moments)
