"""Action errors of exported graphs against the float policy, run by ONNX Runtime on the CPU, unfused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort
from bench import Bench
from numpy.typing import NDArray

from quantvla import staged
from quantvla.calibrate import frame_noise
from quantvla.export.nvfp4_unfused import unfuse_file
from quantvla.runtime.manifest import read_manifest
from quantvla.runtime.sampler import euler_integrate

Array = NDArray[np.float32]


class ActionError(msgspec.Struct):
    """Error of normalized actions against the float policy, relative to the actions' RMS over all frames.

    ``rms`` over all frames; ``median`` and ``largest`` of the frames' own RMS errors.
    """

    rms: float
    median: float
    largest: float


class OrtEngine:
    """The stages of an engine directory under ONNX Runtime on the CPU, without fusing optimizations.

    4-bit floats, which it does not have, become their definition: the files are rewritten. ``steps``: engines
    of the same policy whose repeated stages take turns, one for each denoise step.
    """

    def __init__(self, directory: Path, steps: Sequence[Path] = ()) -> None:
        options = ort.SessionOptions()
        # its extended optimizations change the arithmetic: int4 weights are fused wrongly in 1.32
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.intra_op_num_threads = 1
        self._manifest = read_manifest(directory)
        *once, repeated = self._manifest.stages

        def session(file: Path) -> ort.InferenceSession:
            unfuse_file(file)
            return ort.InferenceSession(file, options)

        self._once = [session(directory / stage.file) for stage in once]
        self._steps = [session(engine / repeated.file) for engine in (steps or (directory,))]

    def chunk(self, tensors: Mapping[str, NDArray[Any]], noise: Array) -> Array:
        """Return the normalized chunk."""
        known, sampler, step = dict(tensors), self._manifest.sampler, count()
        for session in self._once:
            known.update(_run(session, known))

        def velocity(x: Array, t: float) -> Array:
            now = {sampler.state: x, sampler.time: np.array([t], np.float32)}
            session = self._steps[next(step) % len(self._steps)]
            found: Array = _run(session, {**known, **now})[sampler.velocity]
            return found

        return euler_integrate(velocity, noise, sampler.timesteps, sampler.step)


def _run(
    session: ort.InferenceSession, known: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    names = [value.name for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs()]
    found = session.run(outputs, {name: known[name] for name in names})
    return dict(zip(outputs, found, strict=True))


class Comparison:
    """Action errors against the float policy on held-out frames, with the same noise for everything compared."""

    def __init__(self, bench: Bench) -> None:
        self._loaded, heldout = bench.loaded, bench.calibration.part("heldout")
        frames = min(bench.options.heldout, len(heldout))
        preprocess = staged.make_preprocessor(self._loaded.interface)
        self._tensors = [staged.prepare(preprocess, heldout[i].observation) for i in range(frames)]
        shape = self._loaded.interface.sampler.noise_shape
        self._dim = self._loaded.interface.action.dim
        self._noises = [frame_noise(1, index, shape) for index in range(frames)]
        self.exact = self.torch_chunks()

    @property
    def frames(self) -> int:
        """How many frames are compared."""
        return len(self._tensors)

    def torch_chunks(self) -> Array:
        """Return the chunks of the policy as it is in memory: (frames, 1, chunk, action)."""
        loaded = self._loaded
        return np.stack(
            [
                staged.sample(loaded, staged.run_context(loaded, t), noise)[..., : self._dim]
                for t, noise in zip(self._tensors, self._noises, strict=True)
            ]
        )

    def graph_chunks(self, engine: OrtEngine) -> Array:
        """Return an engine's chunks."""
        pairs = zip(self._tensors, self._noises, strict=True)
        return np.stack([engine.chunk(t, noise)[..., : self._dim] for t, noise in pairs])

    def error(self, found: Array) -> ActionError:
        """Return the error of chunks."""
        exact = self.exact
        frames = np.sqrt(np.square(found - exact).mean((1, 2, 3)) / np.square(exact).mean())
        rms = float(np.sqrt(np.square(frames).mean()))
        return ActionError(rms, float(np.median(frames)), float(frames.max()))
