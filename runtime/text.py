"""The task sentence -> token ids, without transformers."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from quantvla.runtime.errors import explain
from quantvla.runtime.normalize import make_normalizer
from quantvla.runtime.processing_steps import FeatureStatistics, Prompt, StateText, Tokenize

_logger = logging.getLogger(__name__)


def make_prompt(prompt: Prompt, task: str, numbers: str = "") -> str:
    """Return the text that is tokenized; ``numbers`` stands for the state where the prompt has it."""
    text = task.strip() if prompt.strip else task
    for old, new in prompt.replace:
        text = text.replace(old, new)
    if prompt.plain:
        text = "".join(ch for ch in text.lower() if ch.isalnum() or ch.isspace() or ch == "_")
    text = text or prompt.empty
    before, _, after = prompt.template.partition("{task}")
    return before.replace("{state}", numbers) + text + after.replace("{state}", numbers)


class StateWriter:
    """Writes a state vector as the numbers of its bins.

    Raises `QuantVLAError` when the statistics it needs are missing.
    """

    def __init__(self, step: StateText, statistics: FeatureStatistics | None) -> None:
        self._normalizer = make_normalizer(step.key, step.mode, step.eps, statistics)
        self._edges = np.linspace(-1, 1, step.bins + 1)[:-1]
        self.dim = self._normalizer.dim

    def __call__(self, state: NDArray[np.float32]) -> str:
        """Return the bins of ``state`` (dim,), physical units, with spaces between."""
        numbers = np.digitize(self._normalizer.normalize(state), self._edges) - 1
        return " ".join(map(str, numbers.tolist()))


class TaskTokenizer:
    """Tokenizes one sentence at a time to a fixed length.

    ``truncated`` counts the sentences that were too long and lost their end; the first one is
    also logged as a warning.
    """

    def __init__(self, step: Tokenize, directory: Path) -> None:
        path = directory / step.file
        if not path.is_file():
            raise explain(path, "tokenizer file is missing", remedy="copy the engine again")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers library raises plain Exception
            raise explain(
                path, "is not a tokenizers JSON file", got=error, remedy="export the engine again"
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(step.max_length)
        self._step = step
        self._cached: tuple[str, NDArray[np.int64], NDArray[np.bool_]] | None = None
        self.truncated = 0

    def __call__(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return tokens (1, max_length) int64 and mask (1, max_length) bool, padded on the right."""
        if self._cached is None or self._cached[0] != text:
            self._cached = (text, *self._encode(text))
        return self._cached[1], self._cached[2]

    def _encode(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        step = self._step
        sentence = text if text.endswith(step.suffix) else text + step.suffix
        encoding = self._tokenizer.encode(sentence)
        if encoding.overflowing:
            self._note_truncated(text)
        tokens = np.full((1, step.max_length), step.pad_id, dtype=np.int64)
        mask = np.zeros((1, step.max_length), dtype=np.bool_)
        tokens[0, : len(encoding.ids)] = encoding.ids
        mask[0, : len(encoding.ids)] = True
        return tokens, mask

    def _note_truncated(self, text: str) -> None:
        self.truncated += 1
        if self.truncated == 1:
            _logger.warning(
                "observation %r: longer than %d tokens and cut, got %r; use a shorter sentence",
                self._step.key,
                self._step.max_length,
                text,
            )
