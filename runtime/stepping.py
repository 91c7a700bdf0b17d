"""A chunk's actions one at a time, for programs without a control loop of their own."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.closing import Closing
from quantvla.runtime.preprocess import Observation

FloatArray = NDArray[np.float32]


class SteppedPolicy(Closing):
    """What `Policy` and the client of a served one share: a queue of actions and a noise generator."""

    def __init__(self, seed: int = 0) -> None:
        self._queue: deque[FloatArray] = deque()
        self._generator = np.random.default_rng(seed)

    @property
    @abstractmethod
    def execute(self) -> int:
        """How many actions of a chunk are run before the next one is predicted."""

    @abstractmethod
    def predict_action_chunk(
        self, obs: Observation, *, noise: NDArray[Any] | None = None, seed: int | None = None
    ) -> FloatArray:
        """Return the next (horizon, dim) float32 actions in physical units."""

    def select_action(
        self, obs: Observation, *, noise: NDArray[Any] | None = None, seed: int | None = None
    ) -> FloatArray:
        """Return the next (dim,) float32 action, to be called once per control tick.

        Predicts a chunk when the queue is empty and queues its first ``execute`` actions; in
        between, the observation is not looked at.
        """
        if not self._queue:
            chunk = self.predict_action_chunk(obs, noise=noise, seed=seed)
            self._queue.extend(chunk[: self.execute])
        return self._queue.popleft()

    def reset(self, *, seed: int | None = None) -> None:
        """Forget queued actions, at the start of an episode; with ``seed``, restart the noise too."""
        self._queue.clear()
        if seed is not None:
            self._generator = np.random.default_rng(seed)
