"""The training objective: flow matching on several noise draws per observation, and the object head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from frames import Batch
from torch import Tensor, nn

from quantvla.evaluate.metaworld import STATE_KEY, Task
from quantvla.families.base import Interface
from quantvla.runtime.normalize import make_normalizer
from quantvla.runtime.processing_steps import (
    Images,
    Normalize,
    ResampledImages,
    Tokenize,
    Unnormalize,
)
from quantvla.staged import make_preprocessor

OBJECT_SCALE = 10.0
"""Positions relative to the hand are a few decimetres: the head predicts them in decimetres."""


class Objective(Protocol):
    """One policy type's part of the loss, an `nn.Module` with the policy in it.

    The time runs from 1 (noise) to 0 and the velocity points to the noise, as in the runtime. ``summary_dim``: length
    of a summary.
    """

    policy: nn.Module
    summary_dim: int

    def context(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        """Return, of a collated batch, a summary (B, summary_dim) of image, text and state, and what ``velocity`` reads."""
        ...

    def velocity(self, context: Any, noisy: Tensor, time: Tensor) -> Tensor:
        """noisy: (B, draws, chunk, padded action), time: (B, draws) -> velocity like noisy."""
        ...


class Learner(nn.Module):
    """The policy and the training-only head; its forward pass is the loss, so that autocast sees one module."""

    def __init__(self, objective: Any) -> None:
        """Add the head that reads the summary: object and goal positions (6)."""
        super().__init__()
        self.objective = objective
        self.head = nn.Linear(objective.summary_dim, 6)

    def forward(
        self, batch: Mapping[str, Tensor], noise: Tensor, time: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return (flow-matching loss, object loss).

        batch: what `Collator` makes. noise: (B, draws, chunk, padded action); time: (B, draws).
        """
        summary, context = self.objective.context(batch)
        used = batch["action"].shape[-1]
        actions = F.pad(batch["action"], (0, noise.shape[-1] - used))[:, None]
        noisy = time[..., None, None] * noise + (1 - time[..., None, None]) * actions
        velocity = self.objective.velocity(context, noisy, time)
        error = (velocity - (noise - actions))[..., :used].square()
        valid = batch["valid"][:, None, :, None].float().expand_as(error)
        flow = (error * valid).sum() / valid.sum()
        objects = F.smooth_l1_loss(
            self.head(summary).float(), batch["objects"] * OBJECT_SCALE, beta=0.1
        )
        return flow, objects

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained, the head's too, by name."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad}


def sample_time(*shape: int) -> Tensor:
    """Return flow times in [0.001, 1], as SmolVLA, pi0 and GR00T all draw them: 0.001 + 0.999 Beta(1.5, 1)."""
    return 0.001 + 0.999 * torch.rand(shape) ** (1 / 1.5)


class Collator:
    """Turns numpy batches into the tensors that an objective reads, by the checkpoint's own preprocessing.

    images (B, cameras, 3, 128, 128), state (B, padded), tokens and mask (B, longest instruction), action (B, chunk, 4),
    normalized; valid (B, chunk), objects (B, 6).
    """

    def __init__(self, interface: Interface, tasks: Sequence[Task], cameras: Sequence[str]) -> None:
        """Tokenize the instruction of every task once; ``cameras``: keys, in the order of the recorded pictures."""
        before = interface.preprocess
        self._images: Images | ResampledImages = _only(before, (Images, ResampledImages))
        self._order = [list(cameras).index(key) for key in self._images.keys]
        self._state: Normalize = _only(before, (Normalize,))
        unnormalize: Unnormalize = _only(interface.postprocess, (Unnormalize,))
        self._normalize_state, self._normalize_action = (
            make_normalizer(step.key, step.mode, step.eps, interface.statistics.get(step.key))
            for step in (self._state, unnormalize)
        )
        text: Tokenize = _only(before, (Tokenize,))
        preprocess = make_preprocessor(interface)
        blank = {
            **{c.key: np.zeros((c.height, c.width, 3), np.uint8) for c in interface.cameras},
            STATE_KEY: np.zeros(interface.state.dim, np.float32),
        }
        found = [preprocess({**blank, text.key: task.instruction}) for task in tasks]
        mask = np.concatenate([tensors[text.mask] for tensors in found])
        longest = int(mask.sum(axis=1).max())  # what is masked influences nothing
        tokens = np.concatenate([tensors[text.tokens] for tensors in found])
        self._tokens = torch.from_numpy(tokens[:, :longest].copy())
        self._mask = torch.from_numpy(mask[:, :longest].copy())

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Return the tensors of one batch."""
        task = torch.from_numpy(batch.task)
        pixels = torch.from_numpy(batch.images[:, self._order]).permute(0, 1, 4, 2, 3)
        state = self._normalize_state.normalize(batch.states)
        if self._state.clip:
            state = state.clip(-1, 1)
        return {
            "images": pixels.float() / 255.0 * self._images.scale + self._images.offset,
            "state": F.pad(
                torch.from_numpy(state), (0, self._state.pad_to - batch.states.shape[1])
            ),
            "action": torch.from_numpy(self._normalize_action.normalize(batch.actions)),
            "tokens": self._tokens[task],
            "mask": self._mask[task],
            "valid": torch.from_numpy(batch.valid),
            "objects": torch.from_numpy(batch.objects),
        }


def _only(steps: Sequence[Any], kinds: tuple[type, ...]) -> Any:
    """Return the one step of these kinds."""
    (step,) = [step for step in steps if isinstance(step, kinds)]
    return step
