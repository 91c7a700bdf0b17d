"""One transformer block as a stage: RMS norm, masked attention with the scale behind the product, gated MLP."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from quantvla.activation_scales import static_input
from quantvla.export.graphs import export_graph
from quantvla.export.site_marks import SiteMark
from quantvla.export.tensorrt_engine import STATIC, lower_graph_
from quantvla.export.tensorrt_sites import TargetSite
from quantvla.families.base import Stage, replaced
from quantvla.quantizer import quantize_weight
from quantvla.runtime.manifest import StageSpec, TensorSpec
from quantvla.statistics import SiteStatistics, observe

TOKENS, WIDTH, HEADS, HIDDEN = 12, 64, 4, 128
CALLS = 64
SITES = ("q", "k", "v", "o", "gate", "up", "down")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("q", "k", "v", "o"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=name == "o"))
        self.gate = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.gain = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (
            m(h).view(1, TOKENS, HEADS, -1).transpose(1, 2) for m in (self.q, self.k, self.v)
        )
        logits = torch.matmul(q, k.transpose(2, 3)) * (WIDTH // HEADS) ** -0.5
        logits = torch.where(mask[:, None, None, :], logits, torch.finfo(torch.float32).min)
        attended = torch.softmax(logits, -1) @ v
        x = x + self.o(attended.transpose(1, 2).reshape(1, TOKENS, WIDTH))
        h = self.norm(x)
        out: Tensor = x + self.down(torch.nn.functional.silu(self.gate(h)) * self.up(h))
        return out


def make_stage() -> Stage:
    torch.manual_seed(0)
    return Stage(
        "prefix", Block().eval(),
        (TensorSpec(name="x", dtype="float32", shape=(1, TOKENS, WIDTH)), TensorSpec(name="mask", dtype="bool", shape=(1, TOKENS))),
        (TensorSpec(name="y", dtype="float32", shape=(1, TOKENS, WIDTH)),),
    )  # fmt: skip


def example(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, TOKENS, WIDTH, generator=generator)
    x[..., 3] *= 30  # one loud channel, as trained transformers have
    mask = torch.ones(1, TOKENS, dtype=torch.bool)
    mask[0, -2:] = False
    return x, mask


def marked_graph(stage: Stage) -> ir.Model:
    """The stage with all its linears as marks."""
    linears = {
        name: SiteMark(name, stage.module.get_submodule(name).out_features) for name in SITES
    }
    with replaced(stage.module, dict(linears)):
        return export_graph(stage)


def statistics(stage: Stage) -> dict[str, SiteStatistics]:
    found = {
        name: SiteStatistics.empty(stage.module.get_submodule(name).in_features) for name in SITES
    }
    with observe(stage.module, found, dict.fromkeys(SITES, CALLS)), torch.no_grad():
        for seed in range(CALLS):
            stage.module(*example(seed))
    return found


def target_sites(stage: Stage, number_format: str) -> dict[str, TargetSite]:
    seen = statistics(stage) if number_format in STATIC else {}
    sites = {}
    for name in SITES:
        linear = stage.module.get_submodule(name)
        weight = linear.weight.detach()
        static = static_input(name, weight, seen[name], number_format) if seen else None
        stored = quantize_weight(weight, 4, 32) if number_format == "int4" else weight
        sites[name] = TargetSite(name, number_format, stored, linear.bias, static)
    return sites


def lower(stage: Stage, number_format: str, activations: str = "fp16") -> ir.Model:
    model = marked_graph(stage)
    lower_graph_(model, target_sites(stage, number_format), activations, frozenset())
    return model


def write(model: ir.Model, directory: Path) -> StageSpec:
    from quantvla.export.graphs import save_graph

    file, *_ = save_graph(model, directory / "prefix.onnx")
    stage = make_stage()
    return StageSpec(name="prefix", file=file, repeat=1, inputs=stage.inputs, outputs=stage.outputs)
