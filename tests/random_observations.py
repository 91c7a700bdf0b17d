"""Observations for policies with random weights."""

from __future__ import annotations

from typing import Any

import numpy as np


def random_observation(size: Any, seed: int, task: str = "push the red block") -> dict[str, Any]:
    """Return an observation of a policy of ``size`` with random pixels and state."""
    rng = np.random.default_rng(seed)
    shape = (size.camera_height, size.camera_width, 3)
    images = {key: rng.integers(0, 256, shape, dtype=np.uint8) for key in size.cameras}
    state = rng.standard_normal(size.state_dim).astype(np.float32)
    return {**images, "observation.state": state, "task": task}
