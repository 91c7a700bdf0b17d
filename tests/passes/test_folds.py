from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from quantvla.families.base import LoadedPolicy
from quantvla.passes import EquivalencePass, FoldNorms, Permute, Rotate, Smooth
from quantvla.pipeline import LEAST_COSINE, Pipeline
from quantvla.runtime.errors import QuantVLAError
from quantvla.structure import Mlp


@pytest.mark.parametrize(
    "passes",
    [
        [FoldNorms()],
        [Smooth(exponents=(0.5,), search=False)],
        [Smooth(formula="awq", exponents=(0.25, 0.5))],
        [FoldNorms(), Rotate()],
        [FoldNorms(), Rotate(block=16, zigzag=True), Permute(order="zigzag", places=("mlps",))],
        [Permute()],
    ],
    ids=["norms", "smoothquant", "awq", "rotations", "duquant", "order"],
)
def test_a_fold_changes_weights_and_no_action(
    passes: list[EquivalencePass], pipeline: Callable[..., Pipeline], loaded: LoadedPolicy
) -> None:
    before = {name: value.clone() for name, value in loaded.policy.named_parameters()}
    reports = pipeline().run(passes)
    after = dict(loaded.policy.named_parameters())
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    for report in reports:
        assert report.folds > 0 and report.equivalence is not None
        assert report.equivalence.cosine_min > LEAST_COSINE and report.equivalence.max_abs < 1e-3
    assert any("q_proj" in name for name in changed)


def test_folding_norms_again_finds_nothing(
    pipeline: Callable[..., Pipeline], loaded: LoadedPolicy
) -> None:
    first, second = pipeline().run([FoldNorms(), FoldNorms()])
    assert first.folds == len(loaded.structure.norms) and second.folds == 0


def test_layer_norm_biases_are_folded_too(
    pipeline: Callable[..., Pipeline], loaded: LoadedPolicy
) -> None:
    pipeline().run([FoldNorms()])
    layer = [norm for norm in loaded.structure.norms if norm.kind == "layer"]
    assert layer
    for norm in layer:
        assert not torch.any(loaded.policy.get_parameter(f"{norm.name}.bias"))


def test_a_rotation_that_does_not_fold_says_why(pipeline: Callable[..., Pipeline]) -> None:
    with pytest.raises(QuantVLAError, match=r"gain is not folded.*put a fold_norms pass before"):
        pipeline().run([Rotate()])
    with pytest.raises(QuantVLAError, match=r"'vision tower': a rotation .* LayerNorms subtract"):
        pipeline().run([Rotate(streams=("vision tower",))])
    with pytest.raises(
        QuantVLAError, match=r"stream 'action': unknown; did you mean 'action head'"
    ):
        pipeline().run([Rotate(streams=("action",))])


def test_a_stream_that_keeps_its_order_is_a_note(pipeline: Callable[..., Pipeline]) -> None:
    subject = pipeline("w4a8-vision8").subject
    (note,) = Permute().notes(subject)
    assert note.startswith("residual stream 'vision tower' keeps its order: its LayerNorms")
    assert Permute(places=("mlps",)).notes(subject) == ()


def test_a_fold_that_changes_actions_stops_with_its_site_and_is_taken_back(
    pipeline: Callable[..., Pipeline], loaded: LoadedPolicy
) -> None:
    good, other, *_ = (mlp for mlp in loaded.structure.mlps if "lm_expert" in mlp.down)
    wrong = Mlp(up=other.up, down=good.down, gate=other.gate)
    structure = replace(loaded.structure, mlps=(*loaded.structure.mlps[:1], wrong))
    before = {name: value.clone() for name, value in loaded.policy.named_parameters()}
    with pytest.raises(
        QuantVLAError, match=rf"{good.down}: folding permute here changes .* cosine"
    ):
        pipeline(structure=structure).run([Permute(places=("mlps",))])
    untouched = loaded.structure.mlps[0]
    changed = {
        name
        for name, value in loaded.policy.named_parameters()
        if not torch.equal(value, before[name])
    }
    assert changed <= {
        f"{module}.weight" for m in (untouched, wrong) for module in (m.up, m.down, m.gate)
    }


def test_scales_are_floored(pipeline: Callable[..., Pipeline]) -> None:
    scale = Smooth(floor=0.1)._scale(torch.tensor([1e-9, 1.0, 100.0]), torch.ones(3), 1.0)
    assert scale.max() / scale.min() == pytest.approx(10)
