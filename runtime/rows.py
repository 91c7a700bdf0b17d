"""A stage before the sampler that runs once for each row of its inputs: the vision tower, camera by camera."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.manifest import StageSpec

Tensors = Mapping[str, NDArray[Any]]
Run = Callable[[Tensors], dict[str, NDArray[Any]]]


def calls(stage: StageSpec, tensors: Tensors) -> Iterator[Tensors]:
    """Yield what the stage is run on: all ``tensors``, or its inputs row by row."""
    if stage.repeat == 1:
        yield tensors
    else:
        for row in range(stage.repeat):
            yield {spec.name: tensors[spec.name][row : row + 1] for spec in stage.inputs}


def run_all(stage: StageSpec, tensors: Tensors, run: Run) -> dict[str, NDArray[Any]]:
    """Return the outputs of a stage before the sampler, its rows joined."""
    return joined([run(call) for call in calls(stage, tensors)])


def joined(rows: Sequence[Tensors]) -> dict[str, NDArray[Any]]:
    """Return the outputs of several runs along their first axis; those of one run as they are."""
    if len(rows) == 1:
        return dict(rows[0])
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
