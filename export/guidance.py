"""The graph of guided real-time chunking: one denoise step together with its Jacobian (arXiv 2506.07339).

The stage is exported to a functional program first, since the backward of the in-place writes in a
policy's attention has no ONNX form; then forward and vector-Jacobian product are traced as one
graph of core operators.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._decomp import core_aten_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from quantvla.export.graphs import example, export_graph, save_graph
from quantvla.families.base import LoadedPolicy, Stage, replaced
from quantvla.quantized_linear import QuantizedLinear
from quantvla.runtime.manifest import EulerSampler, GuidanceSpec, StageSpec, TensorSpec

NAME = "denoise_vjp"
TARGET, WEIGHTS, CORRECTION = "guidance_target", "guidance_weights", "guidance_correction"


class Guided(nn.Module):
    """Velocity and guidance correction of a denoise step.

    Inputs of the step, then target (like x) and weights (1, horizon, 1) -> velocity v and
    ``e (I - t dv/dx)`` with ``e = weights (target - (x - t v))``, both like x.
    """

    def __init__(self, step: Callable[..., Tensor], x: int, time: int) -> None:
        super().__init__()
        self.step, self._x, self._time = step, x, time

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        *inputs, target, weights = tensors
        x, t = inputs[self._x], inputs[self._time]

        def velocity(moved: Tensor) -> Tensor:
            return self.step(*inputs[: self._x], moved, *inputs[self._x + 1 :])

        v, pull_back, *_ = torch.func.vjp(velocity, x)
        error = (target - (x - t * v)) * weights
        (pulled,) = pull_back(error)
        return v, error - t * pulled


def export_guidance(directory: Path, loaded: LoadedPolicy) -> GuidanceSpec:
    """Write the guidance graph of a policy into ``directory`` and return its part of the manifest.

    Integer linears have no derivative: they stand in this graph as float ones with the same
    dequantized weights, so it is as large as the float engine's step.
    """
    sampler = loaded.interface.sampler
    with replaced(loaded.policy, _dequantized(loaded.policy)):
        stage = guided_stage(loaded.stage(sampler.stage), sampler)
        model = export_graph(stage)
    file, *_ = save_graph(model, directory / f"{NAME}.onnx")
    spec = StageSpec(
        name=stage.name, file=file, repeat=stage.repeat, inputs=stage.inputs, outputs=stage.outputs
    )
    return GuidanceSpec(stage=spec, target=TARGET, weights=WEIGHTS, correction=CORRECTION)


def guided_stage(stage: Stage, sampler: EulerSampler) -> Stage:
    """Return the stage that gives velocity and correction of ``stage``, the sampler's."""
    names = [spec.name for spec in stage.inputs]
    _, horizon, _ = sampler.noise_shape
    inputs = (
        *stage.inputs,
        TensorSpec(name=TARGET, dtype="float32", shape=sampler.noise_shape),
        TensorSpec(name=WEIGHTS, dtype="float32", shape=(1, horizon, 1)),
    )
    outputs = (
        *stage.outputs,
        TensorSpec(name=CORRECTION, dtype="float32", shape=sampler.noise_shape),
    )
    guided = Guided(_functional(stage), names.index(sampler.state), names.index(sampler.time))
    tensors = tuple(example(spec) for spec in inputs)
    with torch.no_grad():
        traced = make_fx(
            lambda *given: guided(*given),
            decomposition_table=_decompositions(),
            tracing_mode="real",
        )(*tensors)
    return Stage(NAME, traced.eval(), inputs, outputs, repeat=stage.repeat)


def _functional(stage: Stage) -> nn.Module:
    """Return the stage as a program without in-place writes."""
    with torch.no_grad():
        exported = torch.export.export(
            stage.module, tuple(example(spec) for spec in stage.inputs), strict=False
        )
        table = torch.export.default_decompositions()
        table[torch.ops.aten.copy.default] = _copy
        functional: nn.Module = exported.run_decompositions(table).module()
    return functional


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Decompose a copy, which has no derivative, to one that has."""
    return source.expand(target.shape).to(target.dtype) * 1


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Return core decompositions, and one for uninitialized memory that is written before it is read."""
    return {
        **core_aten_decompositions(),
        torch.ops.aten.empty_permuted.default: lambda size, _order, dtype=None, **_: torch.zeros(
            size, dtype=dtype
        ),
    }


def _dequantized(policy: nn.Module) -> dict[str, nn.Module]:
    """Return float linears in the place of the integer ones."""
    found: dict[str, nn.Module] = {}
    for name, module in policy.named_modules():
        if isinstance(module, QuantizedLinear):
            linear = nn.Linear(
                module.in_features, module.out_features, bias=module.bias is not None
            )
            with torch.no_grad():
                linear.weight.copy_(module.quantized.dequantize())
                if module.bias is not None:
                    linear.bias.copy_(module.bias)
            found[name] = linear
    return found
