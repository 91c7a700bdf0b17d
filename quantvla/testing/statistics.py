"""Made-up dataset statistics for random-weight policies."""

from __future__ import annotations

import torch
from torch import Tensor


def random_statistics(state_dim: int, action_dim: int, seed: int) -> dict[str, dict[str, Tensor]]:
    """Return statistics of every kind for state and action, consistent with each other."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for key, dim in {"observation.state": state_dim, "action": action_dim}.items():
        mean = torch.randn(dim, generator=generator)
        std = torch.rand(dim, generator=generator) + 0.5
        found[key] = {
            "mean": mean, "std": std, "min": mean - 3 * std, "max": mean + 3 * std,
            "q01": mean - 2.3 * std, "q99": mean + 2.3 * std,
            "q10": mean - 1.3 * std, "q90": mean + 1.3 * std,
        }  # fmt: skip
    return found
