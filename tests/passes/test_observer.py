from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quantvla.families.base import LoadedPolicy
from quantvla.passes import RoundWeights
from quantvla.pipeline import Pipeline
from quantvla.quantizer import represented_input
from quantvla.runtime.errors import QuantVLAError


def site(loaded: LoadedPolicy, part: str, kind: str, layer: int = 1) -> str:
    return next(
        s.name for s in loaded.used_sites if (s.part, s.kind, s.layer) == (part, kind, layer)
    )


def inputs_of(made: Pipeline, name: str) -> list[Tensor]:
    """Return what reaches a linear in one run over the set, call by call, outside the observer."""
    seen: list[Tensor] = []
    made.observer.first_call([name])  # the teacher's own run is over
    linear = made.subject.linear(name)
    handle = linear.register_forward_pre_hook(lambda _m, x: seen.append(x[0].clone()))
    made.observer.outputs([name], what="run")
    handle.remove()
    return seen[::2]  # teacher, student, teacher, ...


@pytest.mark.parametrize(("part", "kind"), [("llm", "gate_proj"), ("expert", "down_proj")])
def test_moments_are_those_of_what_the_kernel_makes_of_the_inputs(
    part: str, kind: str, pipeline: Callable[..., Pipeline], loaded: LoadedPolicy
) -> None:
    made, name = pipeline(), site(loaded, part, kind)
    block = made.subject.planned[name].scheme.block
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs_of(made, name)])
    found = made.observer.moments([name], unfinished=[name], attended=False, what="test")[name]
    represented = represented_input(rows, block, "int8_block").double()
    assert found.tokens == len(rows)
    assert torch.allclose(found.student, represented.t() @ represented, rtol=1e-4, atol=1e-3)
    assert torch.allclose(found.cross, rows.double().t() @ represented, rtol=1e-4, atol=1e-3)


def test_attention_weights_context_tokens_and_nothing_else(
    pipeline: Callable[..., Pipeline], loaded: LoadedPolicy
) -> None:
    made = pipeline()
    for part, weighted in (("llm", True), ("expert", False)):
        name = site(loaded, part, "gate_proj")
        plain, attended = (
            made.observer.moments([name], unfinished=[name], attended=flag, what="test")[name]
            for flag in (False, True)
        )
        assert torch.equal(plain.student, attended.student) is not weighted
        assert attended.tokens == plain.tokens
        # weights have mean one: the energy stays of the same order
        ratio = float(attended.student.trace() / plain.student.trace())
        assert 0.3 < ratio < 3


def test_the_student_has_the_finished_integers_and_the_teacher_none(
    pipeline: Callable[..., Pipeline], loaded: LoadedPolicy
) -> None:
    made, name = pipeline(), site(loaded, "expert", "down_proj", layer=3)
    untouched = made.observer.outputs([name], what="before")[name]
    assert torch.equal(untouched.t, untouched.s)
    made.run([RoundWeights(weighting="none", scales="largest")])
    drifted = made.observer.outputs([name], what="after")[name]
    assert torch.equal(drifted.t, untouched.t) and not torch.allclose(drifted.s, untouched.s)


def test_stacked_denoising_steps_are_the_single_ones(
    pipeline: Callable[..., Pipeline], loaded: LoadedPolicy
) -> None:
    made, name = pipeline(), site(loaded, "expert", "gate_proj")
    (stacked, *_) = inputs_of(made, name)
    assert stacked.shape[0] == loaded.stage("denoise").repeat
    first = made.observer.first_call([name])[name]
    assert torch.allclose(stacked[0].reshape(first.shape), first, atol=1e-5)


def test_moments_that_are_not_finite_name_site_and_frame(
    pipeline: Callable[..., Pipeline], loaded: LoadedPolicy
) -> None:
    made, name = pipeline(), site(loaded, "expert", "down_proj")
    with torch.no_grad():
        made.subject.linear(name.replace("down_proj", "up_proj")).weight[0, 0] = torch.inf
    with pytest.raises(
        QuantVLAError, match=rf"{name}, calibration frame 0: its input is not finite"
    ):
        made.observer.moments([name], unfinished=[name], attended=False, what="test")
