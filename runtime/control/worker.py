"""Where inference runs: in a thread of its own, or in virtual time with a delay of a number of ticks."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.control.clock import Clock
from quantvla.runtime.control.strategy import Request

FloatArray = NDArray[np.float32]
Predict = Callable[[Request], FloatArray]


@dataclass(frozen=True)
class Inference:
    """A finished request: its chunk (horizon, dim), or the error that came instead."""

    request: Request
    chunk: FloatArray | None
    error: Exception | None
    latency_s: float


class Worker(Protocol):
    """Computes one request at a time."""

    @property
    def busy(self) -> bool:
        """Whether a request is neither finished nor taken by `poll`."""
        ...

    def submit(self, request: Request) -> None:
        """Begin a request. Only when not busy."""
        ...

    def poll(self, tick: int) -> Inference | None:
        """Return the finished request if there is one at ``tick``, else None at once."""
        ...

    def wait(self, timeout_s: float) -> Inference | None:
        """Return the finished request as soon as there is one, None after ``timeout_s``."""
        ...

    def close(self) -> None:
        """End; a request that hangs is left behind."""
        ...


class ThreadWorker:
    """Runs ``predict`` in a daemon thread, so that a hanging engine cannot keep the process alive."""

    def __init__(self, predict: Predict, clock: Clock) -> None:
        self._predict, self._clock = predict, clock
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Inference] = queue.SimpleQueue()
        self.busy = False
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Begin a request."""
        self.busy = True
        self._requests.put(request)

    def poll(self, tick: int) -> Inference | None:
        """Return the finished request, None if there is none yet."""
        return self.wait(0.0)

    def wait(self, timeout_s: float) -> Inference | None:
        """Return the finished request, None after ``timeout_s``."""
        try:
            result = self._results.get(timeout=timeout_s)
        except queue.Empty:
            return None
        self.busy = False
        return result

    def close(self) -> None:
        """Let the thread end after the request it is at, and wait a moment for that."""
        self._requests.put(None)
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        while (request := self._requests.get()) is not None:
            start_s = self._clock.now()
            chunk, error = infer(self._predict, request)
            self._results.put(Inference(request, chunk, error, self._clock.now() - start_s))


class DelayedWorker:
    """Computes at once and hands over ``delay_ticks`` after the tick that was asked for: every run is alike."""

    def __init__(self, predict: Predict, delay_ticks: int = 0) -> None:
        self._predict, self._delay_ticks = predict, delay_ticks
        self._result: Inference | None = None

    @property
    def busy(self) -> bool:
        """Whether a result waits for its tick."""
        return self._result is not None

    def submit(self, request: Request) -> None:
        """Compute a request."""
        self._result = Inference(request, *infer(self._predict, request), 0.0)

    def poll(self, tick: int) -> Inference | None:
        """Return the result from its tick on."""
        if self._result is None or tick < self._result.request.tick + self._delay_ticks:
            return None
        return self.wait(0.0)

    def wait(self, timeout_s: float) -> Inference | None:
        """Return the result."""
        result, self._result = self._result, None
        return result

    def close(self) -> None:
        """Do nothing."""


def infer(predict: Predict, request: Request) -> tuple[FloatArray | None, Exception | None]:
    """Return the chunk of a request, or the error that came instead."""
    try:
        return predict(request), None
    except Exception as error:  # whatever the engine raises must not end the control loop
        return None, error
