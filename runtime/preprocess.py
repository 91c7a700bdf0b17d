"""Observation -> model inputs, by executing a manifest's steps.

The compiler calibrates and verifies with these classes too: one resize, one normalization and one
tokenizer for calibration, verification and the robot.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.errors import explain
from quantvla.runtime.images import make_image_runner
from quantvla.runtime.manifest import CameraSpec, VectorSpec
from quantvla.runtime.normalize import make_normalizer
from quantvla.runtime.observation import (
    check_no_other_images,
    read_text,
    read_vector,
)
from quantvla.runtime.processing_steps import (
    FeatureStatistics,
    Images,
    Normalize,
    PreprocessStep,
    ResampledImages,
    Tokenize,
)
from quantvla.runtime.text import StateWriter, TaskTokenizer, make_prompt

Observation = Mapping[str, object]
Tensors = dict[str, NDArray[Any]]


class Preprocessor:
    """Executes preprocessing steps on one observation at a time.

    An observation maps camera keys to (height, width, 3) uint8 RGB images, the state key to the
    raw vector in physical units and the task key to a sentence. Images under other keys are an
    error; other unknown keys are ignored. An image of another size than its camera in ``cameras``
    is resized like any other if there is a resize step, with one warning per camera (the size in
    a checkpoint is often not the size the robot recorded at); without a resize step it is an error.

    ``directory`` holds the tokenizer file that a Tokenize step names. ``state`` gives the length
    and the names of the state vector; without it the length is that of the statistics.
    Raises `QuantVLAError` for a step it does not know and for missing statistics.
    """

    def __init__(
        self,
        steps: Sequence[PreprocessStep],
        statistics: Mapping[str, FeatureStatistics],
        directory: str | os.PathLike[str],
        *,
        cameras: Sequence[CameraSpec] = (),
        state: VectorSpec | None = None,
    ) -> None:
        self._tokenizers: list[TaskTokenizer] = []
        self._runners: list[Callable[[Observation], Tensors]] = []
        keys: set[str] = set()
        for step in steps:
            if isinstance(step, Images | ResampledImages):
                keys.update(step.keys)
                self._runners.append(make_image_runner(step, cameras))
            elif isinstance(step, Normalize):
                keys.add(step.key)
                self._runners.append(_VectorRunner(step, statistics, state))
            elif isinstance(step, Tokenize):
                keys.add(step.key)
                if step.prompt.state is not None:
                    keys.add(step.prompt.state.key)
                runner = _TextRunner(step, Path(directory), statistics, state)
                self._tokenizers.append(runner.tokenizer)
                self._runners.append(runner)
            else:
                raise explain(
                    "preprocessing",
                    "unknown step",
                    got=type(step).__name__,
                    remedy="upgrade quantvla on this machine; known: Images, ResampledImages, "
                    "Normalize, Tokenize",
                )
        self.keys = frozenset(keys)

    @property
    def truncated(self) -> int:
        """How many sentences were cut because they were longer than the model takes."""
        return sum(tokenizer.truncated for tokenizer in self._tokenizers)

    def __call__(self, obs: Observation) -> Tensors:
        """Return the model's input tensors by name; raises `QuantVLAError` for a bad observation."""
        check_no_other_images(obs, self.keys)
        tensors: Tensors = {}
        for runner in self._runners:
            tensors.update(runner(obs))
        return tensors


class _VectorRunner:
    def __init__(
        self,
        step: Normalize,
        statistics: Mapping[str, FeatureStatistics],
        state: VectorSpec | None,
    ) -> None:
        self._step = step
        self._normalizer = make_normalizer(
            step.key, step.mode, step.eps, statistics.get(step.key), flat_to_zero=step.flat_to_zero
        )
        self._reader = _VectorReader(step.key, self._normalizer.dim, state)
        dim = self._reader.dim
        if dim is not None and dim > step.pad_to:
            raise explain(
                f"observation {step.key!r}",
                f"a vector of {dim} does not fit a model input of {step.pad_to}",
                remedy="export the engine again",
            )

    def __call__(self, obs: Observation) -> Tensors:
        vector = self._reader(obs)
        if vector.size > self._step.pad_to:
            raise explain(
                f"observation {self._step.key!r}",
                f"expected at most {self._step.pad_to} numbers",
                got=vector.size,
                remedy="pass the raw vector",
            )
        padded = np.zeros((1, self._step.pad_to), dtype=np.float32)
        normalized = self._normalizer.normalize(vector)
        padded[0, : vector.size] = normalized.clip(-1, 1) if self._step.clip else normalized
        return {self._step.output: padded}


class _VectorReader:
    """Reads the vector at ``key``, whose length ``state`` or the statistics (``stated``) know."""

    def __init__(self, key: str, stated: int | None, state: VectorSpec | None) -> None:
        known = state if state is not None and state.key == key else None
        self._key, self._names = key, known.names if known else ()
        self.dim = known.dim if known else stated
        if stated not in (None, self.dim):
            raise explain(
                f"observation {key!r}",
                f"a vector of {self.dim} does not fit statistics of {stated}",
                remedy="export the engine again",
            )

    def __call__(self, obs: Observation) -> NDArray[np.float32]:
        return read_vector(obs, self._key, self.dim, self._names)


class _TextRunner:
    def __init__(
        self,
        step: Tokenize,
        directory: Path,
        statistics: Mapping[str, FeatureStatistics],
        state: VectorSpec | None,
    ) -> None:
        self._step = step
        self.tokenizer = TaskTokenizer(step, directory)
        text = step.prompt.state
        if text is not None:
            self._write = StateWriter(text, statistics.get(text.key))
            self._reader = _VectorReader(text.key, self._write.dim, state)

    def __call__(self, obs: Observation) -> Tensors:
        step = self._step
        task = read_text(obs, step.key)
        numbers = "" if step.prompt.state is None else self._write(self._reader(obs))
        tokens, mask = self.tokenizer(make_prompt(step.prompt, task, numbers))
        return {step.tokens: tokens, step.mask: mask}
