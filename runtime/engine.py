"""The stages of an engine directory, run in the order of its manifest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.backend import DeviceSession, Session, backend_for
from quantvla.runtime.errors import explain
from quantvla.runtime.guidance import Guidance
from quantvla.runtime.machine import physical_cores
from quantvla.runtime.manifest import Manifest, StageSpec
from quantvla.runtime.reuse import Reuse
from quantvla.runtime.rows import run_all
from quantvla.runtime.sampler import Observer, Velocity, check_time, euler_integrate, with_steps

FloatArray = NDArray[np.float32]
Tensors = Mapping[str, NDArray[Any]]
Durations = dict[str, list[int]]


class Engine:
    """Loaded stages. Tensors are found by name in one mapping, which grows from stage to stage.

    ``threads`` None takes one thread per physical core that the process may use.
    """

    def __init__(self, directory: Path, manifest: Manifest, *, threads: int | None = None) -> None:
        self.threads = _check_threads(threads)
        self.directory = directory
        self._backend = backend_for(manifest.target)
        self.versions = self._backend.versions()
        self._sampler, self._loop = manifest.sampler, manifest.loop
        *self._once, self._repeated = manifest.stages
        self._guidance = manifest.guidance
        self._durations: Durations | None = None
        self._sessions: dict[str, Session] | None = {}
        for stage in (*self._once, self._loop or self._repeated):
            self._session(stage)

    def load_guidance(self) -> None:
        """Load the graph of guided chunking, which holds the stage's weights once more.

        Raises `QuantVLAError` for an engine that has none.
        """
        self.check_open()
        if self._guidance is None:
            raise explain(
                self.directory,
                "has no graph for guidance 'vjp'",
                remedy="export it with --guidance, or use guidance 'prefix' or 'forward'",
            )
        self._session(self._guidance.stage)

    def load_step(self) -> None:
        """Load the graph of a single denoise step, beside that of the whole loop where there is one."""
        self._session(self._repeated)

    def _session(self, stage: StageSpec) -> Session:
        """Return the loaded ``stage``, which is loaded when it is wanted first."""
        self.check_open()
        assert self._sessions is not None
        if stage.name not in self._sessions:
            path = self.directory / stage.file
            self._sessions[stage.name] = self._backend.load(path, stage, self.threads)
        return self._sessions[stage.name]

    def guided(
        self, tensors: Tensors, x: FloatArray, t: float, guidance: Guidance
    ) -> tuple[FloatArray, FloatArray]:
        """Return velocity and correction of the guidance graph at ``x`` and ``t``, both noise shape."""
        self.load_guidance()
        assert self._guidance is not None
        step = {
            self._sampler.state: x,
            self._sampler.time: np.array([t], dtype=np.float32),
            self._guidance.target: guidance.target,
            self._guidance.weights: guidance.weights,
        }
        outputs = self._run(self._guidance.stage, {**tensors, **step})
        return outputs[self._sampler.velocity], outputs[self._guidance.correction]

    def prepare(self, inputs: Tensors, reuse: Reuse | None = None) -> dict[str, NDArray[Any]]:
        """Run the stages before the sampler; returns ``inputs`` and every stage's outputs.

        ``reuse`` decides which of them must be run; None runs all.
        """
        tensors = dict(inputs)
        run_stage = run_all if reuse is None else reuse.run
        for stage in self._once:
            tensors.update(run_stage(stage, tensors, partial(self._run, stage)))
        return tensors

    def velocity(self, tensors: Tensors, x: FloatArray, t: float) -> FloatArray:
        """Run the sampler's stage once, at any x and t.

        tensors: from `prepare`; x: noise shape float32; t: the flow's time -> noise shape float32.
        """
        shape = self._sampler.noise_shape
        if x.shape != shape or x.dtype != np.float32:
            raise explain(
                "velocity x",
                f"expected float32 of shape {shape}",
                got=f"{x.dtype} {x.shape}",
                remedy="pass the padded chunk",
            )
        check_time(self._sampler, t)
        return self._velocity(tensors, x, t)

    def sample(
        self,
        tensors: Tensors,
        noise: FloatArray,
        observe: Observer | None = None,
        guidance: Guidance | None = None,
        steps: int | None = None,
    ) -> FloatArray:
        """Integrate from ``noise``; returns the normalized, padded chunk, noise shape float32.

        With ``guidance`` the chunk continues the one that the guidance was made from. ``steps``
        None takes as many as the policy was made for; then, where nobody watches or guides the
        steps, the engine library runs the loop whole if it can: from a graph of the loop, or on a device.
        """
        if observe is None and guidance is None and steps is None:
            if self._loop is not None:
                run, loop = self._session(self._loop).run, self._loop
                inputs = {**tensors, self._sampler.state: noise}
                return self._whole(lambda: run(inputs)[loop.outputs[0].name])
            session = self._session(self._repeated)
            if isinstance(session, DeviceSession):
                return self._whole(partial(session.sample, tensors, noise, self._sampler))
        sampler = self._sampler if steps is None else with_steps(self._sampler, steps)
        velocity: Velocity = partial(self._velocity, tensors)
        if guidance is not None:
            velocity = partial(self._guided, tensors, noise, guidance)
        return euler_integrate(velocity, noise, sampler.timesteps, sampler.step, observe)

    def _velocity(self, tensors: Tensors, x: FloatArray, t: float) -> FloatArray:
        step = {self._sampler.state: x, self._sampler.time: np.array([t], dtype=np.float32)}
        return self._run(self._repeated, {**tensors, **step})[self._sampler.velocity]

    def _guided(
        self, tensors: Tensors, noise: FloatArray, guidance: Guidance, x: FloatArray, t: float
    ) -> FloatArray:
        """Return the velocity with what ``guidance`` adds."""
        if guidance.method == "vjp":
            return guidance.corrected(*self.guided(tensors, x, t, guidance), t)
        v = self._velocity(tensors, x, t)
        if guidance.method == "prefix":
            return guidance.along_path(noise, v)
        return guidance.corrected(v, guidance.correction(x, v, t), t)

    def _whole(self, sample: Callable[[], FloatArray]) -> FloatArray:
        """Run all steps at once; a step's recorded time is its share of the loop's."""
        start_ns = time.perf_counter_ns()
        chunk = sample()
        if self._durations is not None:
            steps = len(self._sampler.timesteps)
            share = (time.perf_counter_ns() - start_ns) // steps
            self._durations.setdefault(self._repeated.name, []).extend([share] * steps)
        return chunk

    @contextmanager
    def timing(self) -> Iterator[Durations]:
        """Collect, while the block runs, the nanoseconds of every run of every stage, by stage name."""
        self._durations = {}
        try:
            yield self._durations
        finally:
            self._durations = None

    def record(self, name: str, start_ns: int) -> None:
        """Note for an open `timing` block that ``name`` took from ``start_ns`` until now."""
        if self._durations is not None:
            self._durations.setdefault(name, []).append(time.perf_counter_ns() - start_ns)

    def close(self) -> None:
        """Free the sessions; the engine cannot be used afterwards. Closing twice is fine."""
        for session in (self._sessions or {}).values():
            if isinstance(session, DeviceSession):
                session.close()
        self._sessions = None

    def check_open(self) -> None:
        """Raise `QuantVLAError` if the engine was closed."""
        if self._sessions is None:
            raise explain(
                self.directory, "the policy was closed", remedy="load it again with from_pretrained"
            )

    def _run(self, stage: StageSpec, tensors: Tensors) -> dict[str, NDArray[Any]]:
        session = self._session(stage)
        start_ns = time.perf_counter_ns()
        outputs = session.run(tensors)
        self.record(stage.name, start_ns)
        return outputs


def _check_threads(threads: int | None) -> int:
    if threads is None:
        return physical_cores()
    if threads < 1:
        raise explain(
            "threads", "expected at least 1", got=threads, remedy="leave it out for all cores"
        )
    return threads
