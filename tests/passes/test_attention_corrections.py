from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from quantvla.export.graphs import export_graph, save_graph
from quantvla.families.base import LoadedPolicy
from quantvla.float_weights import FloatWeights
from quantvla.passes import BalanceOutputs, CorrectOutputs, MatchTemperature, RoundWeights
from quantvla.passes.atm import fold_temperature_
from quantvla.passes.base import Factors, Observer, Subject
from quantvla.passes.correct_output import fitted
from quantvla.passes.head_factors import clip_notes, limited, scale_output_
from quantvla.pipeline import Pipeline
from quantvla.plan import Plan
from quantvla.quantizer import QuantizedWeight, integer_linear, quantize_weight
from quantvla.runtime.errors import QuantVLAError
from quantvla.statistics import LogitSums, OutputSums
from quantvla.structure import Attention, Structure


class Store(dict[str, QuantizedWeight]):
    def put(self, site: str, weight: QuantizedWeight) -> None:
        self[site] = weight


def subject_of(
    policy: nn.Module, structure: Structure, observer: Any = None, store: Any = None
) -> Subject:
    return Subject(
        policy, Plan("test", ()), structure, {}, FloatWeights(policy), store or Store(), observer,
        Path("unused"),
    )  # fmt: skip


def test_factors_have_a_neutral_band_and_a_bound() -> None:
    raw = torch.tensor([0.5, 0.975, 1.0, 1.029, 1.04, 2.0])
    expected = [math.exp(-0.3), 1.0, 1.0, 1.0, 1.04, math.exp(0.3)]
    assert limited(raw, 0.30, 0.03).tolist() == pytest.approx(expected, rel=1e-6)


def test_clipped_factors_are_a_warning_with_their_share() -> None:
    factors = [Factors("q", "expert", 0, (2.0, 1.1, 0.5, 1.0), (1.35, 1.1, 0.74, 1.0))]
    (note,) = clip_notes("head temperatures", factors, 0.30)
    assert note.startswith("warning: 2 of 4 head temperatures (50%) were clipped at e^±0.3")
    assert clip_notes("head temperatures", factors, 0.70) == ()


@contextmanager
def multiplied_at_run_time(
    loaded: LoadedPolicy, alpha: Mapping[str, Tensor], beta: Mapping[str, Tensor]
) -> Iterator[None]:
    """Multiply logits and attention outputs while the block runs, as the published code does."""
    model: Any = loaded.policy.get_submodule("model.vlm_with_expert")
    original = model.eager_attention_forward
    attention: list[str] = []

    def attend(mask: Tensor, batch: int, dim: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        factors = alpha.get(attention[-1], torch.ones(q.shape[2])).view(1, 1, -1, 1)
        result: Tensor = original(mask, batch, dim, q * factors, k, v)
        return result

    def hook(name: str) -> Callable[..., None]:
        return lambda *_: attention.append(name)

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in loaded.policy.named_modules()
        if name.endswith(".q_proj")
    ]
    handles += [
        loaded.policy.get_submodule(site).register_forward_hook(
            lambda _m, _i, y, factor=factor: y * factor
        )
        for site, factor in beta.items()
    ]
    with mock.patch.object(model, "eager_attention_forward", attend):
        yield
    for handle in handles:
        handle.remove()


def test_folded_factors_are_the_run_time_multiplications_on_the_exported_engine(
    loaded: LoadedPolicy, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(5)
    attentions = [a for a in loaded.structure.attentions if a.part == "expert"]
    alpha = {a.q: 0.75 + 0.6 * torch.rand(a.heads, generator=generator) for a in attentions}
    beta = {a.o: 0.75 + 0.6 * torch.rand(1, generator=generator) for a in attentions}
    stage = loaded.stage("denoise")
    inputs = [
        torch.ones(spec.shape, dtype=torch.bool)
        if spec.dtype == "bool"
        else torch.randn(spec.shape, generator=generator)
        for spec in stage.inputs
    ]
    with torch.inference_mode():
        plain = stage.module(*inputs)
        with multiplied_at_run_time(loaded, alpha, beta):
            expected = stage.module(*inputs)
    subject = subject_of(loaded.policy, loaded.structure)
    for attention in attentions:
        fold_temperature_(subject, attention, alpha[attention.q])
        width = loaded.policy.get_submodule(attention.o).out_features
        scale_output_(subject, attention.o, beta[attention.o].expand(int(width)))  # type: ignore[arg-type]
    save_graph(export_graph(stage), tmp_path / "denoise.onnx")
    session = ort.InferenceSession(tmp_path / "denoise.onnx", providers=["CPUExecutionProvider"])
    feed = {spec.name: value.numpy() for spec, value in zip(stage.inputs, inputs, strict=True)}
    (found,) = session.run(None, feed)
    assert np.abs(plain - expected).max() > 1e-2  # the factors matter
    assert np.abs(found - expected.numpy()).max() < 1e-5


def test_a_factor_on_integers_goes_into_their_scales() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(64, 24)
    store = Store(site=quantize_weight(linear.weight, 4, 32))
    factors = 0.75 + 0.6 * torch.rand(24, generator=generator)
    x = torch.randn(10, 64, generator=generator)
    before = integer_linear(x, store["site"], linear.bias)
    codes, bias = store["site"].codes, linear.bias
    scale_output_(
        subject_of(nn.ModuleDict({"site": linear}), Structure(), store=store), "site", factors
    )
    found = integer_linear(x, store["site"], linear.bias)
    assert torch.equal(store["site"].codes, codes) and not torch.equal(linear.bias, bias)
    # scales are half-precision numbers: eleven bits
    assert torch.allclose(found, before * factors, rtol=2**-10, atol=1e-3)


class QueryNormed(nn.Module):
    """Logits of an attention that normalizes its queries: x (length, width) -> (heads, length, length)."""

    def __init__(self, heads: int, head_dim: int, *, heads_last: bool) -> None:
        super().__init__()
        self.q_proj = nn.Linear(32, heads * head_dim)
        self.k_proj = nn.Linear(32, heads * head_dim)
        self.q_norm = nn.RMSNorm(head_dim)
        self.heads, self.head_dim, self.heads_last = heads, head_dim, heads_last

    def forward(self, x: Tensor) -> Tensor:
        q, k = (p(x).view(-1, self.heads, self.head_dim) for p in (self.q_proj, self.k_proj))
        norm = self.q_norm
        bare = torch.nn.functional.rms_norm
        if self.heads_last:
            q = (bare(q, (self.head_dim,), eps=1e-6) * norm.weight).transpose(0, 1)
        else:
            q = bare(q.transpose(0, 1), (self.head_dim,), eps=1e-6) * norm.weight
        return q @ k.permute(1, 2, 0) / math.sqrt(self.head_dim)


@pytest.mark.parametrize("heads_last", [True, False])
def test_behind_a_query_norm_the_temperature_goes_into_its_gain(heads_last: bool) -> None:
    torch.manual_seed(0)
    module = QueryNormed(4, 8, heads_last=heads_last)
    with torch.no_grad():
        module.q_norm.weight.uniform_(0.5, 1.5)
    x, alpha = torch.randn(6, 32), torch.tensor([0.8, 1.0, 1.2, 1.3])
    attention = Attention(
        "q_proj", "o", "expert", 0, 4, 8, q_norm="q_norm", q_norm_axis=0 if heads_last else 1
    )
    with torch.no_grad():
        before = module(x)
        rows = alpha.repeat_interleave(8)
        weight, bias = module.q_proj.weight.clone(), module.q_proj.bias.clone()
        module.q_proj.weight.mul_(rows[:, None])
        module.q_proj.bias.mul_(rows)
        assert torch.allclose(module(x), before, atol=1e-5)  # W_q is the wrong place
        module.q_proj.weight.copy_(weight)
        module.q_proj.bias.copy_(bias)
        fold_temperature_(subject_of(module, Structure()), attention, alpha)
        assert torch.allclose(module(x), before * alpha[:, None, None], atol=1e-5)


@dataclass
class Drifted:
    """An observer whose student has spread and energy off by known factors."""

    logit_factors: Tensor
    output_factor: float
    frames: int = 1

    def logits(self, queries: Sequence[str], **_: object) -> Mapping[str, LogitSums]:
        found = {}
        for query in queries:
            sums = LogitSums()
            values = torch.randn(len(self.logit_factors), 4000) + 3
            sums.teacher.add_(values)
            sums.student.add_(values * self.logit_factors[:, None])
            found[query] = sums
        return found

    def outputs(self, sites: Sequence[str], **_: object) -> Mapping[str, OutputSums]:
        found = {}
        for site in sites:
            sums, values = OutputSums.empty(32), torch.randn(500, 32)
            sums.add_(values, values * self.output_factor)
            found[site] = sums
        return found


def test_what_is_measured_is_multiplied_not_divided() -> None:
    torch.manual_seed(0)
    module = nn.ModuleDict({"q": nn.Linear(16, 32), "o": nn.Linear(32, 32)})
    structure = Structure(attentions=(Attention("q", "o", "expert", 0, 4, 8),))
    drift = torch.tensor([0.8, 1.0, 1.01, 1.2])
    observer: Observer = Drifted(drift, 1.25)  # type: ignore[assignment]
    subject = subject_of(module, structure, observer)
    weights = [module[name].weight.clone() for name in "qo"]
    temperature = MatchTemperature()(subject, lambda *_: None)
    balance = BalanceOutputs()(subject, lambda *_: None)
    expected = torch.where(drift.log().abs() < 0.03, torch.ones(4), 1 / drift)
    assert temperature.factors[0].applied == pytest.approx(expected.tolist(), rel=1e-4)
    assert balance.factors[0].applied == pytest.approx((1 / 1.25,), rel=1e-4)
    q, o = (module[name].weight for name in "qo")
    assert torch.allclose(q, weights[0] * expected.repeat_interleave(8)[:, None], rtol=1e-4)
    assert torch.allclose(o, weights[1] / 1.25, rtol=1e-4)


def test_output_correction_is_the_least_squares_fit_per_channel() -> None:
    torch.manual_seed(0)
    student = torch.randn(400, 3) * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([0.3, 0.0, -1.0])
    teacher = student * torch.tensor([1.1, 0.9, 1.0]) + torch.tensor([0.0, 0.2, -0.1])
    sums = OutputSums.empty(3)
    sums.add_(teacher + 0.01 * torch.randn(400, 3), student)
    gain, bias = fitted(sums, 0.3)
    assert gain.tolist() == pytest.approx([1.1, 0.9, 1.0], abs=0.01)
    assert bias.tolist() == pytest.approx([0.0, 0.2, -0.1], abs=0.01)
    one, only = fitted(sums, 0.0)
    assert one.tolist() == [1, 1, 1] and not torch.allclose(only, bias)


def test_output_correction_brings_every_linear_closer(
    pipeline: Callable[..., Pipeline], loaded: LoadedPolicy
) -> None:
    made = pipeline()
    made.run([RoundWeights(weighting="none", scales="largest")])
    sites = list(made.subject.planned)
    before = made.observer.outputs(sites, what="before")
    made.run([RoundWeights(weighting="none", scales="largest"), CorrectOutputs()])
    after = made.observer.outputs(sites, what="after")

    def error(sums: OutputSums) -> float:
        return float(((sums.tt - 2 * sums.ts + sums.ss).sum() / sums.tt.sum()).sqrt())

    last = [site for site in sites if "lm_expert.layers.3.mlp.down_proj" in site]
    assert error(after[last[0]]) < error(before[last[0]])
    gained = sum(error(after[site]) < error(before[site]) for site in sites)
    assert gained > 0.8 * len(sites)


def test_corrections_leave_the_teacher_alone(
    pipeline: Callable[..., Pipeline], loaded: LoadedPolicy
) -> None:
    made = pipeline()
    _, temperature, balance = made.run(
        [
            RoundWeights(weighting="none", scales="largest"),
            MatchTemperature(clip=3.0, band=0.0),
            BalanceOutputs(clip=3.0, band=0.0),
        ]
    )
    assert len(temperature.factors) == len(balance.factors) == 4
    queries = [entry.site for entry in temperature.factors]
    again = made.observer.logits(queries, what="again")
    for entry in temperature.factors:
        sums = again[entry.site]
        assert sums.teacher.count > 0
    # observed once more, the first layer's heads have the teacher's spread: nothing before it drifts later
    first = again[queries[0]]
    ratio = first.teacher.deviation / first.student.deviation
    assert torch.allclose(ratio, torch.ones(len(ratio), dtype=ratio.dtype), atol=1e-3)


@pytest.mark.parametrize("correction", [MatchTemperature, BalanceOutputs])
def test_a_part_without_attention_is_refused(
    pipeline: Callable[..., Pipeline], correction: type[MatchTemperature | BalanceOutputs]
) -> None:
    with pytest.raises(
        QuantVLAError, match=r"part 'exprt' .* has no attention there; did you mean 'expert'"
    ):
        pipeline().run([RoundWeights(), correction(parts=("exprt",))])
    with pytest.raises(QuantVLAError, match="no attention there; leave the pass out"):
        correction()(pipeline(structure=Structure()).subject, lambda *_: None)


def test_temperatures_of_logits_that_nothing_shows_are_refused(
    pipeline: Callable[..., Pipeline],
) -> None:
    with pytest.raises(
        QuantVLAError, match=r"q_proj: the family shows no logits .*; leave its part"
    ):
        pipeline().run([RoundWeights(), MatchTemperature(parts=("vision",))])
