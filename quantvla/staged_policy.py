"""A checkpoint in torch, stage by stage, behind the same call as the runtime's `Policy`.

What runs a quantized checkpoint in closed loop without exporting it (in the reference arithmetic of
its integers), and a float one with another number of denoise steps than it was made for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantvla import staged
from quantvla.checkpoint import is_quantized, load_quantized
from quantvla.families import load_policy
from quantvla.families.base import LoadedPolicy
from quantvla.runtime.postprocess import Postprocessor
from quantvla.runtime.sampler import euler_integrate, with_steps


class StagedPolicy:
    """The runtime's own preprocessing, sampler and postprocessing around the stages in torch."""

    def __init__(self, loaded: LoadedPolicy, *, denoise_steps: int | None = None) -> None:
        interface = loaded.interface
        self.loaded = loaded
        self.sampler = interface.sampler
        if denoise_steps is not None:
            self.sampler = with_steps(self.sampler, denoise_steps)
        self._before = staged.make_preprocessor(interface)
        self._after = Postprocessor(interface.postprocess, interface.statistics)

    @classmethod
    def from_pretrained(
        cls, directory: Path, *, denoise_steps: int | None = None, threads: int | None = None
    ) -> StagedPolicy:
        """Load a LeRobot or a quantized checkpoint; ``threads`` sets torch's thread count for the process."""
        if threads is not None:
            torch.set_num_threads(threads)
        loaded = load_quantized(directory)[0] if is_quantized(directory) else load_policy(directory)
        return cls(loaded, denoise_steps=denoise_steps)

    def predict_action_chunk(
        self,
        obs: Mapping[str, Any],
        *,
        noise: NDArray[np.float32] | None = None,
        seed: int | None = None,
    ) -> NDArray[np.float32]:
        """Return the chunk in physical units: (horizon, action dim) float32."""
        shape = self.sampler.noise_shape
        if noise is None:
            noise = np.random.default_rng(seed).standard_normal(shape, np.float32)
        context = staged.run_context(self.loaded, staged.prepare(self._before, obs))
        normalized = euler_integrate(
            lambda x, t: staged.velocity(self.loaded, context, x, t),
            noise.reshape(shape),
            self.sampler.timesteps,
            self.sampler.step,
        )
        return self._after(normalized, context)
