"""Kernels of an engine against their reference arithmetic, call by call, on the engine's own inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from quantvla.export.integers import IntegerSite
from quantvla.export.kernels import Activation, Combine
from quantvla.export.site_values import AttentionValues, Probe, SiteValues
from quantvla.fidelity.attention import attention_difference
from quantvla.fidelity.trajectories import Frame, Trajectory, visible
from quantvla.progress import Progress
from quantvla.quantizer import integer_linear
from quantvla.runtime import kernels
from quantvla.runtime.policy import Policy
from quantvla.runtime.rows import calls

KERNEL_FRAMES = 8  # frames on which every kernel call is compared


@dataclass(frozen=True)
class CallErrors:
    """The error of every call over the largest magnitude of its output: integer linears, own attentions."""

    linears: list[float] = field(default_factory=list)
    attentions: list[float] = field(default_factory=list)


def kernel_errors(
    engine: Path,
    policy: Policy,
    integers: Sequence[IntegerSite],
    frames: Sequence[Frame],
    ours: Sequence[Trajectory],
    progress: Progress,
) -> CallErrors:
    """Return the relative error of every kernel call on the first frames, on the engine's own inputs."""
    sampler, sites = policy.manifest.sampler, {site.site: site for site in integers}
    bfloat16 = kernels.BFLOAT16 in kernels.available().attention
    probes = [Probe(engine, stage) for stage in policy.manifest.stages] if integers else []
    errors = CallErrors()
    for index, frame in enumerate(frames[:KERNEL_FRAMES] if integers else ()):
        progress("kernels", index, min(KERNEL_FRAMES, len(frames)))
        observed = visible(policy, frame)
        known = {**policy.preprocessor(observed), **policy.prepare(observed)}
        for x, t in zip(ours[index].states, sampler.timesteps, strict=True):
            known |= {sampler.state: x, sampler.time: np.array([t], np.float32)}
            for stage, probe in zip(policy.manifest.stages, probes, strict=True):
                if stage.name != sampler.stage and t != sampler.timesteps[0]:
                    continue
                inputs = (known,) if stage.name == sampler.stage else calls(stage, known)
                for values in (v for call in inputs for v in probe(call)):
                    if isinstance(values, AttentionValues):
                        errors.attentions.append(attention_difference(values, bfloat16=bfloat16))
                    else:
                        errors.linears.append(_kernel_difference(values, sites[values.site]))
    return errors


def _kernel_difference(values: SiteValues, site: IntegerSite) -> float:
    expected = _fused(
        integer_linear(torch.from_numpy(values.x), site.weight, site.bias), values
    ).numpy()
    return float(np.abs(values.y - expected).max() / max(float(np.abs(expected).max()), 1e-12))


def _fused(y: torch.Tensor, values: SiteValues) -> torch.Tensor:
    """Return what a kernel makes of its linear layer's result ``y`` (..., out)."""
    if values.activation is Activation.GELU_TANH:
        y = functional.gelu(y, approximate="tanh")
    elif values.activation is Activation.SILU:
        y = functional.silu(y)
    if values.other is None:
        return y
    other = torch.from_numpy(values.other)
    return y + other if values.combine is Combine.ADD else y * other
