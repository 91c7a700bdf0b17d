"""The one thread that owns the policy; the server's event loop hands it requests and awaits answers."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.errors import QuantVLAError, explain
from quantvla.runtime.guidance import ActionPrefix
from quantvla.runtime.manifest import Manifest
from quantvla.runtime.preprocess import Observation
from quantvla.runtime.sampler import standard_noise
from quantvla.runtime.serve.request import Request

FloatArray = NDArray[np.float32]


class ServedPolicy(Protocol):
    """What is served: `quantvla.runtime.policy.Policy`, or anything that predicts chunks like it."""

    @property
    def manifest(self) -> Manifest: ...

    def predict_action_chunk(
        self,
        obs: Observation,
        *,
        noise: NDArray[Any] | None = None,
        seed: int | None = None,
        prefix: ActionPrefix | None = None,
    ) -> FloatArray: ...

    def load_step(self) -> None: ...

    def warm_up(self, runs: int = 1) -> None: ...

    def close(self) -> None: ...


class StaleRequestError(QuantVLAError):
    """A request waited so long that a robot should not move on what it saw then."""


class ClientGoneError(QuantVLAError):
    """The client went away while its request waited, so nothing was computed."""


@dataclass(frozen=True)
class Answer:
    """A chunk, (horizon, dim) in physical units, and the seconds it waited, was read and computed."""

    actions: FloatArray
    queue_s: float
    decode_s: float
    infer_s: float


@dataclass
class Session:
    """One client: the noise of requests that bring neither noise nor seed, as in a fresh `Policy`."""

    generator: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))


_Job = Callable[[], object]


class InferenceThread:
    """Loads a policy in a thread of its own and runs all its requests there, one after the other."""

    def __init__(self, load: Callable[[], ServedPolicy], *, max_wait_s: float) -> None:
        self._load = load
        self._max_wait_s = max_wait_s
        self._policy: ServedPolicy | None = None
        self._running_since: float | None = None
        self._jobs: queue.SimpleQueue[tuple[_Job, asyncio.Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)

    async def start(self) -> None:
        """Load the policy and run it once; raises what loading raises."""
        self._thread.start()
        await self._submit(self._start)

    def running_s(self) -> float:
        """Return for how many seconds the current job has run, 0 when there is none."""
        since = self._running_since
        return 0.0 if since is None else time.monotonic() - since

    async def predict(
        self, read: Callable[[], Request], session: Session, wanted: Callable[[], bool]
    ) -> Answer:
        """Return the answer to the request that ``read`` makes, in the order of calls.

        Raises `StaleRequestError` if it waited too long, `ClientGoneError` if ``wanted`` says so when
        its turn comes, `QuantVLAError` for a bad request, and whatever the engine raises.
        """
        received = time.monotonic()
        answer = await self._submit(lambda: self._predict(read, session, wanted, received))
        assert isinstance(answer, Answer)
        return answer

    def stop(self, timeout_s: float) -> None:
        """Let the thread finish its job and free the policy, or leave it behind after ``timeout_s``."""
        self._jobs.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    async def _submit(self, job: Callable[[], Any]) -> Any:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._jobs.put((job, future))
        return await future

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, future = item
            self._running_since = time.monotonic()
            result: object = None
            error: Exception | None = None
            try:
                result = job()
            except Exception as raised:  # handed to the caller, whatever the engine raises
                error = raised
            self._running_since = None
            try:
                future.get_loop().call_soon_threadsafe(_settle, future, result, error)
            except RuntimeError:  # the event loop is closed: nobody waits any more
                break
        if self._policy is not None:
            self._policy.close()

    def _start(self) -> None:
        self._policy = self._load()
        self._policy.load_step()  # a request may have a prefix
        self._policy.warm_up()

    def _predict(
        self,
        read: Callable[[], Request],
        session: Session,
        wanted: Callable[[], bool],
        received: float,
    ) -> Answer:
        assert self._policy is not None
        started = time.monotonic()
        waited = started - received
        if not wanted():
            raise ClientGoneError("the client went away")
        if waited > self._max_wait_s:
            stale = explain(
                "request",
                f"waited longer than {self._max_wait_s:g} s, the observation is stale",
                got=f"{waited:.2f} s",
                remedy="observe again; use fewer clients or a faster engine",
            )
            raise StaleRequestError(str(stale))
        request = read()
        noise = request.noise
        if noise is None and request.seed is None:
            noise = standard_noise(session.generator, self._policy.manifest.sampler.noise_shape)
        decoded = time.monotonic()
        actions = self._policy.predict_action_chunk(
            request.observation, noise=noise, seed=request.seed, prefix=request.prefix
        )
        return Answer(actions, waited, decoded - started, time.monotonic() - decoded)


def _settle(future: asyncio.Future[Any], result: object, error: Exception | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
