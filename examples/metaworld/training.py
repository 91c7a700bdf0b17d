"""A training run that can be stopped and resumed: the same steps follow as if it had not been stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import compact
import torch
import torch.distributed as dist
from learner import Learner, sample_time
from torch import Tensor, nn

from quantvla.runtime.files import atomic_file

DRAWS = 4
"""Noise draws that learn from one prefix."""
LONGEST_STEP_S = 10.0
"""A step counts for no more than this: a suspended run does not use up its schedule."""


@dataclass(frozen=True)
class Schedule:
    """How long a run trains, over all its resumed parts: ``steps``, or ``minutes`` of training time; and how."""

    minutes: float | None
    steps: int | None
    peak_lr: float
    ema: float
    object_weight: float
    bf16: bool

    def progress(self, step: int, trained_s: float) -> float:
        """Return the share of the run that is done, in [0, 1]."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        assert self.minutes is not None
        return min(1.0, trained_s / (60 * self.minutes))


def one_cycle(progress: float) -> float:
    """Return the learning-rate factor at ``progress`` in [0, 1]: 3 % linear warm-up, then a cosine to 1 %."""
    if progress < 0.03:
        return max(progress / 0.03, 0.01)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - 0.03) / 0.97))


class Run:
    """Everything that a resumed run needs: parameters, optimizer, moving average, step, training seconds."""

    def __init__(self, learner: Learner, schedule: Schedule, noise_width: int, rank: int) -> None:
        """Start from scratch; ``resume`` replaces the state. ``noise_width``: of an action with its padding."""
        self.learner = learner
        self.schedule = schedule
        self.noise_width = noise_width
        self.rank = rank
        self.parameters = learner.trainable()
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=schedule.peak_lr, betas=(0.9, 0.98), weight_decay=0.01
        )
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.step = 0
        self.trained_s = 0.0
        self._last_s = time.monotonic()

    @property
    def progress(self) -> float:
        """The share of the run that is done, in [0, 1]."""
        return self.schedule.progress(self.step, self.trained_s)

    def trained_policy(self) -> dict[str, Tensor]:
        """Return the moving average of the policy's parameters, by their names in the policy."""
        prefix = "objective.policy."
        return {n.removeprefix(prefix): t for n, t in self.average.items() if n.startswith(prefix)}

    def resume(self, path: Path) -> None:
        """Load what ``save`` wrote."""
        state = torch.load(path, weights_only=True)
        self._assign(state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average, self.step = state["average"], state["step"]
        self.trained_s = state["trained_s"]

    def save(self, path: Path) -> None:
        """Write the whole state, atomically."""
        state = {
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
            "trained_s": self.trained_s,
        }
        with atomic_file(path) as partial:
            torch.save(state, partial)

    def resume_compact(self, path: Path, policy: Mapping[str, Tensor]) -> None:
        """Go on from the exported weights of ``policy`` and what ``save_compact`` wrote: about, not exactly, the same run."""
        state = compact.load(path, self.parameters)
        weights = {f"objective.policy.{name}": tensor for name, tensor in policy.items()}
        self._assign({**weights, **state.head})
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.step, self.trained_s = state.step, state.trained_s
        for name, parameter in self.parameters.items():
            if name in state.second_moments:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(state.step)),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": state.second_moments[name],
                }

    def save_compact(self, path: Path) -> None:
        """Write what a run needs beside its exported weights to go on: some hundred kilobytes."""
        moments = {
            name: self.optimizer.state[parameter]["exp_avg_sq"]
            for name, parameter in self.parameters.items()
            if parameter in self.optimizer.state
        }
        head = {n: t for n, t in self.average.items() if n.startswith("head.")}
        compact.save(path, compact.State(self.step, self.trained_s, head, moments))

    @torch.no_grad()
    def _assign(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def train_step(self, batch: Mapping[str, Tensor]) -> tuple[float, float]:
        """Update the parameters once, from the mean gradient of all workers; return the two losses.

        The noise is that of this step and worker, whatever ran before.
        """
        torch.manual_seed(1_000_000 * self.rank + self.step)
        size, chunk = batch["action"].shape[:2]
        noise = torch.randn(size, DRAWS, chunk, self.noise_width)
        draw_time = sample_time(size, DRAWS)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.schedule.bf16):
            flow, objects = self.learner(batch, noise, draw_time)
        (flow + self.schedule.object_weight * objects).backward()
        now = time.monotonic()
        elapsed_s = min(now - self._last_s, LONGEST_STEP_S)
        shared = torch.tensor([flow.item(), objects.item(), elapsed_s])
        self._last_s = now
        self._average_over_workers(shared)
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        rate = self.schedule.peak_lr * one_cycle(self.progress)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(self.schedule.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self.average[name].lerp_(parameter, 1 - decay)
        self.step += 1
        self.trained_s += float(shared[2])
        return float(shared[0]), float(shared[1])

    def _average_over_workers(self, shared: Tensor) -> None:
        """Replace every gradient, and the numbers in ``shared``, by the mean over the workers."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        flat = torch.cat([shared, *[g.reshape(-1) for g in gradients]])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        shared.copy_(flat[: len(shared)])
        offset = len(shared)
        for gradient in gradients:
            gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()
