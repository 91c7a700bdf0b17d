"""The student's velocities against the teacher's, differentiable: what trains parameters of integer linears."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quantvla.families.base import LoadedPolicy, Stage, replaced
from quantvla.lockstep import Lockstep
from quantvla.staged import Tensors, as_tensor, sample, stacked, stage_tensors

_ORDER, _NOISE = 1, 2
"""Keys of the random streams, next to the seed."""


class VelocityMatching:
    """Draws of a calibration frame and a noise; the student denoises from the teacher's states on them.

    Every frame comes once before any comes again, each time with another noise. The same ``draw`` is
    the same frame and noise in every run.
    """

    def __init__(self, loaded: LoadedPolicy, runs: Lockstep, seed: int, what: str) -> None:
        self._loaded, self._runs, self._seed = loaded, runs, seed
        self._contexts = runs.contexts(what)
        loaded.policy.requires_grad_(
            False
        )  # gradients are for what stands in the place of its linears

    def loss(self, linears: Mapping[str, nn.Module], draw: int) -> Tensor:
        """Return sum |v - v_teacher|² / sum |v_teacher|² over all steps of one draw, with ``linears`` in place."""
        known = self._contexts[self._frame(draw)]
        states, expected = self._teacher(known, draw)
        with replaced(self._loaded.policy, dict(linears)):
            found = self._velocities(linears, known, states)
        target = self._actions(torch.cat([as_tensor(v) for v in expected]))
        return (self._actions(found) - target).square().sum() / target.square().sum()

    def _frame(self, draw: int) -> int:
        count = len(self._contexts)
        order = np.random.default_rng((self._seed, _ORDER, draw // count)).permutation(count)
        return int(order[draw % count])

    def _teacher(
        self, known: Tensors, draw: int
    ) -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]:
        """Return the teacher's states and velocities on its way from the draw's noise."""
        states: list[NDArray[np.float32]] = []
        velocities: list[NDArray[np.float32]] = []

        def keep(x: NDArray[np.float32], v: NDArray[np.float32]) -> None:
            states.append(x.copy())
            velocities.append(v.copy())

        noise = np.random.default_rng((self._seed, _NOISE, draw)).standard_normal(
            self._loaded.interface.sampler.noise_shape, np.float32
        )
        with self._runs.teacher():
            sample(self._loaded, known, noise, keep)
        return states, velocities

    def _velocities(
        self, linears: Iterable[str], known: Tensors, states: list[NDArray[np.float32]]
    ) -> Tensor:
        """Return the velocities (steps, horizon, padded) at ``states``; what no linear changes is the teacher's."""
        sampler = self._loaded.interface.sampler
        context = {name: as_tensor(value) for name, value in known.items()}
        for stage in self._stages_from(linears):
            context |= stage_tensors(stage, context)
        stage = self._loaded.stage(sampler.stage)
        calls = [
            {**context, sampler.state: as_tensor(x), sampler.time: torch.tensor([t])}
            for x, t in zip(states, sampler.timesteps, strict=True)
        ]
        found = [stage_tensors(stage, call)[sampler.velocity] for call in stacked(stage, calls)]
        return torch.cat(found)

    def _stages_from(self, linears: Iterable[str]) -> Iterator[Stage]:
        """Yield the stages before the sampler's, from the first that holds one of ``linears``."""
        replaced_here = set(linears)
        changed = {site.stage for site in self._loaded.sites if site.name in replaced_here}
        reached = False
        for stage in self._loaded.stages:
            reached = reached or stage.name in changed
            if reached and stage.name != self._loaded.interface.sampler.stage:
                yield stage

    def _actions(self, velocities: Tensor) -> Tensor:
        action = self._loaded.interface.action
        return velocities[:, : action.horizon, : action.dim]
