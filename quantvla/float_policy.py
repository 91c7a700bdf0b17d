"""The float policy as lerobot runs it: its own preprocessor, policy and postprocessor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.policies.factory import make_pre_post_processors
from numpy.typing import NDArray

from quantvla.families import load_policy
from quantvla.families.base import LoadedPolicy


class FloatPolicy:
    """A LeRobot checkpoint behind the same calls as the runtime's `Policy`.

    Everything between the observation and the actions is lerobot's code, so this is the yardstick
    the engine's whole path is measured with.
    """

    def __init__(self, loaded: LoadedPolicy) -> None:
        self.loaded = loaded
        sampler, action = loaded.interface.sampler, loaded.interface.action
        self.noise_shape = sampler.noise_shape
        self.horizon, self.execute = action.horizon, action.execute
        config: Any = loaded.policy.config
        self._before, self._after = make_pre_post_processors(
            config,
            pretrained_path=str(loaded.directory),
            preprocessor_overrides={
                **{step: dict(values) for step, values in loaded.processor_overrides.items()},
                "device_processor": {"device": "cpu"},
            },
            postprocessor_overrides={"device_processor": {"device": "cpu"}},
        )

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, threads: int | None = None) -> FloatPolicy:
        """Load a checkpoint directory; ``threads`` sets torch's thread count for the process."""
        if threads is not None:
            torch.set_num_threads(threads)
        return cls(load_policy(Path(directory)))

    def sample_noise(self, seed: int | None = None) -> NDArray[np.float32]:
        """Return flow noise of ``noise_shape``, as the runtime draws it from the same seed."""
        return np.random.default_rng(seed).standard_normal(self.noise_shape, np.float32)

    def predict_normalized(
        self, obs: Mapping[str, Any], *, noise: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Return the chunk before unnormalization: (horizon, action dim) float32."""
        batch = self._before(self._batch(obs))
        with torch.inference_mode():
            chunk = self.loaded.predict_chunk(self.loaded.policy, batch, torch.from_numpy(noise))
        return np.asarray(chunk[0].numpy(), np.float32)

    def predict_action_chunk(
        self,
        obs: Mapping[str, Any],
        *,
        noise: NDArray[np.float32] | None = None,
        seed: int | None = None,
    ) -> NDArray[np.float32]:
        """Return the chunk in physical units: (horizon, action dim) float32."""
        noise = self.sample_noise(seed) if noise is None else noise
        normalized = self.predict_normalized(obs, noise=noise.reshape(self.noise_shape))
        return np.asarray(self._after(torch.from_numpy(normalized)).numpy(), np.float32)

    def _batch(self, obs: Mapping[str, Any]) -> dict[str, Any]:
        """Return what lerobot's robots and environments hand to the preprocessor: float CHW images in [0, 1]."""
        interface = self.loaded.interface
        batch: dict[str, Any] = {"task": obs[interface.task_key]}
        for camera in interface.cameras:
            image = torch.from_numpy(np.ascontiguousarray(obs[camera.key]))
            batch[camera.key] = image.permute(2, 0, 1).float() / 255
        batch[interface.state.key] = torch.from_numpy(
            np.asarray(obs[interface.state.key], np.float32)
        )
        return batch
