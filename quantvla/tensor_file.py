"""Tensors in safetensors files and read as pages of these: memory that the system can drop and read again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantvla.runtime.files import atomic_file

SUFFIX = ".safetensors"
_ALIGNMENT = 64
"""Bytes: where tensors begin in memory changes how products are summed, so it is the same for every file."""


def header(shapes: Mapping[str, Sequence[int]]) -> bytes:
    """Return what a safetensors file of float32 tensors of these shapes begins with; their values follow in order."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(entries).encode()
    encoded += b" " * (-(8 + len(encoded)) % _ALIGNMENT)
    return len(encoded).to_bytes(8, "little") + encoded


def write_parts(path: Path, name: str, shape: Sequence[int], parts: Iterable[Tensor]) -> Tensor:
    """Write a tensor whose leading rows come in ``parts``, and return it as `read` does.

    Replaces what is at ``path``; who has that mapped keeps it. The file is whole when it gets its name, and on
    disk when it is flushed.
    """
    with atomic_file(path, flush=False) as partial, partial.open("wb") as stream:
        stream.write(header({name: shape}))
        for part in parts:
            stream.write(part.detach().float().contiguous().numpy().data)
    return read(path)


def read(path: Path) -> Tensor:
    """Return the tensor of a file, as its pages."""
    (value,) = load_file(path).values()
    return value


def mapped(path: Path, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Write arrays to one file, replacing what is there, and return them as its pages."""
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()
    }
    with atomic_file(path) as partial:
        save_file(tensors, partial)
    return read_arrays(path)


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of a file, as its pages."""
    return {name: value.numpy() for name, value in load_file(path).items()}


def name_of(path: Path) -> str:
    """Return the name of the tensor that a file is named after."""
    return path.name.removesuffix(SUFFIX)
