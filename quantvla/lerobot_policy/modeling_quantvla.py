"""The runtime's policy behind lerobot's policy class: batches of tensors in, actions in physical units out."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from quantvla.lerobot_policy.configuration_quantvla import QuantVLAConfig, no_training
from quantvla.runtime.errors import explain
from quantvla.runtime.policy import Policy


class QuantVLAPolicy(PreTrainedPolicy):  # type: ignore[misc]
    """Runs an engine directory as a lerobot policy.

    Normalization is inside the engine, so lerobot's processors around it do not normalize and the
    actions leave in physical units: for a batch of one they are those of `Policy`. The elements of
    a larger batch are computed one after the other.
    """

    config_class = QuantVLAConfig
    name = "quantvla"

    def __init__(self, config: QuantVLAConfig, *inputs: Any, **kwargs: Any) -> None:
        super().__init__(config)
        self._policy = Policy.from_pretrained(config.engine_directory(), threads=config.threads)
        self._policy.reset(seed=config.seed)
        self._queue: deque[Tensor] = deque()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path | None = None,
        *,
        config: QuantVLAConfig | None = None,
        **kwargs: Any,
    ) -> QuantVLAPolicy:
        """Return the policy of ``config.engine``; there are no weights in lerobot's format to load."""
        if config is None:
            engine = None if pretrained_name_or_path is None else str(pretrained_name_or_path)
            config = QuantVLAConfig(engine=engine)
        policy = cls(config)
        policy.eval()
        return policy

    def reset(self) -> None:
        """Forget queued actions, at the start of an episode."""
        self._queue.clear()

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any], noise: Tensor | None = None) -> Tensor:
        """Return (batch, horizon, dim) float32 actions in physical units.

        noise: (batch, horizon, padded), else drawn from the policy's generator.
        """
        size = _batch_size(batch, self._policy.manifest.state.key)
        chunks = [
            self._policy.predict_action_chunk(
                self._observation(batch, index),
                noise=None if noise is None else noise[index].cpu().numpy(),
            )
            for index in range(size)
        ]
        return torch.from_numpy(np.stack(chunks))

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], noise: Tensor | None = None) -> Tensor:
        """Return the next (batch, dim) actions; predicts when the queue is empty."""
        if not self._queue:
            chunk = self.predict_action_chunk(batch, noise=noise)
            execute = self._policy.manifest.action.execute
            self._queue.extend(chunk[:, :execute].unbind(dim=1))
        return self._queue.popleft()

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Any] | None]:
        """Raise `QuantVLAError`: an engine cannot be trained."""
        raise no_training()

    def get_optim_params(self) -> dict[str, Any]:
        """Raise `QuantVLAError`: an engine cannot be trained."""
        raise no_training()

    def _observation(self, batch: Mapping[str, Any], index: int) -> dict[str, object]:
        """Return element ``index`` of the batch as the runtime takes it."""
        manifest = self._policy.manifest
        obs: dict[str, object] = {
            key: _pixels(key, value[index]) if "image" in key else value[index].cpu().numpy()
            for key, value in batch.items()
            if key.startswith("observation.") and isinstance(value, Tensor)
        }
        task = batch.get(manifest.task_key)
        if task is not None:
            obs[manifest.task_key] = task if isinstance(task, str) else task[index]
        return obs


def _batch_size(batch: Mapping[str, Any], state_key: str) -> int:
    if state_key not in batch:
        raise explain(
            f"observation {state_key!r}",
            "is missing",
            got=", ".join(sorted(batch)),
            remedy="map its name with --policy.rename_map",
        )
    return int(batch[state_key].shape[0])


def _pixels(key: str, image: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return lerobot's (3, height, width) image in [0, 1] as (height, width, 3) uint8, as the camera gave it.

    lerobot divides uint8 pixels by 255, which rounding undoes exactly.
    """
    if image.dtype == torch.uint8:
        pixels = image
    else:
        low, high = image.aminmax()
        if not (low >= 0 and high <= 1):
            raise explain(
                f"observation {key!r}",
                "expected pixels in [0, 1]",
                got=f"{float(low):g} to {float(high):g}",
                remedy="leave images as lerobot's environments and cameras give them",
            )
        pixels = (image * 255).round().to(torch.uint8)
    return pixels.permute(1, 2, 0).cpu().numpy()
