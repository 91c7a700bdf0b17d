"""A policy on a robot: observations in, actions in physical units out."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.engine import Durations, Engine, Tensors
from quantvla.runtime.errors import explain
from quantvla.runtime.guidance import ActionPrefix, Guidance, make_guidance
from quantvla.runtime.manifest import Manifest, check_files, read_manifest
from quantvla.runtime.postprocess import Postprocessor
from quantvla.runtime.preprocess import Observation, Preprocessor
from quantvla.runtime.reuse import Reuse, ReuseCounts, ReuseSpec
from quantvla.runtime.sampler import standard_noise
from quantvla.runtime.stepping import SteppedPolicy
from quantvla.runtime.wiring import check_wiring

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Prediction:
    """One action chunk with what led to it.

    actions: (horizon, dim) physical units; normalized: (1, horizon, padded), the model's output;
    states, velocities: (steps, 1, horizon, padded), each denoise step's input and velocity;
    tensors: inputs and outputs of the stages before the sampler, by name.
    """

    actions: FloatArray
    normalized: FloatArray
    states: FloatArray
    velocities: FloatArray
    tensors: dict[str, NDArray[Any]]


class Policy(SteppedPolicy):
    """Runs an engine directory. One object serves one robot: it is not meant for several threads.

    An observation maps each camera key of ``manifest.cameras`` to a (height, width, 3) uint8 RGB
    image, ``manifest.state.key`` to the raw state vector, ``manifest.task_key`` to the sentence.

    Noise that is not given is standard normal from ``numpy.random.default_rng``: from a generator
    seeded with 0 when the policy is loaded, which every chunk advances, or for one call from
    ``seed``. The same observation and noise give the same actions.
    """

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        engine: Engine,
        reuse: ReuseSpec | None = None,
    ) -> None:
        super().__init__()
        self._reuse = None if reuse is None else Reuse(reuse, manifest)
        self.directory = directory
        self.manifest = manifest
        self.preprocessor = Preprocessor(
            manifest.preprocess,
            manifest.statistics,
            directory,
            cameras=manifest.cameras,
            state=manifest.state,
        )
        self.postprocessor = Postprocessor(manifest.postprocess, manifest.statistics)
        self._engine = engine

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        *,
        threads: int | None = None,
        verify_checksums: bool = True,
        reuse: ReuseSpec | None = None,
    ) -> Policy:
        """Load an engine directory; raises `QuantVLAError` if it is damaged or made for a newer runtime.

        ``threads`` None takes one per physical core. Checking the SHA-256 of all files reads each
        once; switch it off only where start-up time matters more than a damaged copy. ``reuse``
        None computes every chunk whole.
        """
        path = Path(directory)
        manifest = read_manifest(path)
        check_wiring(manifest)
        if verify_checksums:
            check_files(path, manifest)
        return cls(path, manifest, Engine(path, manifest, threads=threads), reuse)

    @property
    def threads(self) -> int:
        """Threads that a stage runs on."""
        return self._engine.threads

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the libraries that run the stages here (``manifest.versions``: that made them)."""
        return self._engine.versions

    @property
    def reuse_counts(self) -> ReuseCounts | None:
        """How much was reused since loading or warming up; None if nothing may be."""
        return None if self._reuse is None else self._reuse.counts

    @property
    def execute(self) -> int:
        """How many actions of a chunk `select_action` gives out."""
        return self.manifest.action.execute

    def predict_action_chunk(
        self,
        obs: Observation,
        *,
        noise: NDArray[Any] | None = None,
        seed: int | None = None,
        prefix: ActionPrefix | None = None,
        steps: int | None = None,
    ) -> FloatArray:
        """Return the next (horizon, dim) float32 actions in physical units.

        noise: (1, horizon, padded) or (horizon, padded), see ``manifest.sampler.noise_shape``.
        With ``prefix`` the chunk continues the actions given there (real-time chunking). ``steps``
        denoise steps are run instead of the policy's own number.
        Raises `QuantVLAError` for a bad observation, bad noise, or actions that are not finite.
        """
        start_ns = time.perf_counter_ns()
        tensors = self.prepare(obs)
        actions = self.sample_chunk(tensors, noise=noise, seed=seed, prefix=prefix, steps=steps)
        self._engine.record("chunk", start_ns)
        return actions

    def sample_chunk(
        self,
        tensors: Tensors,
        *,
        noise: NDArray[Any] | None = None,
        seed: int | None = None,
        prefix: ActionPrefix | None = None,
        steps: int | None = None,
    ) -> FloatArray:
        """Return a chunk (horizon, dim) as `predict_action_chunk`, of an observation that `prepare` has seen."""
        start, guidance = self._start(noise, seed), self._guidance(prefix, tensors)
        normalized = self._engine.sample(tensors, start, guidance=guidance, steps=steps)
        return self._actions(normalized, tensors)

    def sample_noise(self, seed: int | None = None) -> FloatArray:
        """Return standard normal noise, (1, horizon, padded) float32, from ``seed`` or the generator."""
        generator = self._generator if seed is None else np.random.default_rng(seed)
        return standard_noise(generator, self.manifest.sampler.noise_shape)

    def warm_up(self, runs: int = 1) -> None:
        """Predict ``runs`` chunks of a blank observation, so that the first real one is not slow.

        Neither the queue nor the noise generator changes.
        """
        obs = self.blank_observation()
        for _ in range(runs):
            self._forget()
            self.predict_action_chunk(obs, seed=0)
        self._forget()
        if self._reuse is not None:
            self._reuse.counts = ReuseCounts()

    def reset(self, *, seed: int | None = None) -> None:
        """Forget queued actions and what could be reused; with ``seed``, restart the noise too."""
        super().reset(seed=seed)
        self._forget()

    def _forget(self) -> None:
        if self._reuse is not None:
            self._reuse.forget()

    def blank_observation(self) -> dict[str, object]:
        """Return a valid observation: grey images, the mean state (or zeros) and a sentence."""
        manifest = self.manifest
        statistics = manifest.statistics.get(manifest.state.key)
        mean = statistics.mean if statistics is not None else None
        obs: dict[str, object] = {
            camera.key: np.full((camera.height, camera.width, 3), 128, dtype=np.uint8)
            for camera in manifest.cameras
        }
        state = np.zeros(manifest.state.dim) if mean is None else np.array(mean)
        return {**obs, manifest.state.key: state, manifest.task_key: "pick"}

    def load_guidance(self) -> None:
        """Load what a prefix of method ``vjp`` needs; raises `QuantVLAError` if the engine has it not."""
        self._engine.load_guidance()

    def load_step(self) -> None:
        """Load what a prefix, another number of steps and `velocity` need, now and not at their first use.

        An engine may have a graph of all its steps, and runs that one until a single step is asked for.
        """
        self._engine.load_step()

    def prepare(self, obs: Observation) -> dict[str, NDArray[Any]]:
        """Preprocess ``obs`` and run the stages before the sampler; returns every tensor by name."""
        self._engine.check_open()
        start_ns = time.perf_counter_ns()
        inputs = self.preprocessor(obs)
        self._engine.record("preprocess", start_ns)
        if self._reuse is not None:
            self._reuse.see(obs)
        return self._engine.prepare(inputs, self._reuse)

    def run_context(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """Run the stages before the sampler on what ``preprocessor`` made; returns every tensor by name.

        Nothing is taken from earlier chunks.
        """
        return self._engine.prepare(inputs)

    def velocity(self, tensors: Tensors, x: FloatArray, t: float) -> FloatArray:
        """Return the velocity at ``x`` and time ``t``, teacher-forced; ``tensors`` from `prepare`.

        x: (1, horizon, padded) float32 -> the same shape.
        """
        return self._engine.velocity(tensors, x, t)

    def predict(
        self, obs: Observation, *, noise: NDArray[Any] | None = None, seed: int | None = None
    ) -> Prediction:
        """Return the chunk of `predict_action_chunk` together with what led to it, for verification."""
        tensors = self.prepare(obs)
        steps: list[tuple[FloatArray, FloatArray]] = []
        normalized = self._engine.sample(
            tensors, self._start(noise, seed), lambda x, v: steps.append((x, v))
        )
        states, velocities = (np.stack(column) for column in zip(*steps, strict=True))
        actions = self._actions(normalized, tensors)
        return Prediction(actions, normalized, states, velocities, tensors)

    @contextmanager
    def timing(self) -> Iterator[Durations]:
        """Collect nanoseconds while the block runs: ``preprocess``, each stage by name, ``chunk``."""
        with self._engine.timing() as durations:
            yield durations

    def close(self) -> None:
        """Free the engine; the policy cannot be used afterwards. Closing twice is fine."""
        self.reset()
        self._engine.close()

    def _start(self, noise: NDArray[Any] | None, seed: int | None) -> FloatArray:
        """Return the noise to start from, checked."""
        if noise is None:
            return self.sample_noise(seed)
        if seed is not None:
            raise explain(
                "noise", "given together with a seed", got=seed, remedy="pass one of them"
            )
        shape = self.manifest.sampler.noise_shape
        array = np.asarray(noise)
        if array.shape not in (shape, shape[1:]) or array.dtype.kind != "f":
            raise explain(
                "noise",
                f"expected floats of shape {shape} or {shape[1:]}",
                got=f"{array.dtype} {array.shape}",
                remedy="sample it for the padded action dimension (Policy.sample_noise does)",
            )
        if not np.isfinite(array).all():
            raise explain("noise", "must be finite", got="NaN or infinity", remedy="sample it anew")
        return array.reshape(shape).astype(np.float32)

    def _guidance(self, prefix: ActionPrefix | None, tensors: Tensors) -> Guidance | None:
        if prefix is None:
            return None
        normalized = self.postprocessor.normalize(prefix.actions, tensors)
        return make_guidance(prefix, normalized, self.manifest.sampler.noise_shape)

    def _actions(self, normalized: FloatArray, tensors: Tensors) -> FloatArray:
        actions = self.postprocessor(normalized, tensors)
        if not np.isfinite(actions).all():
            raise explain(
                self.directory,
                "the model's actions must be finite",
                got="NaN or infinity",
                remedy="do not run them; check the engine with `quantvla verify`",
            )
        return actions
