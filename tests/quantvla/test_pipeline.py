from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantvla import lockstep
from quantvla.calib_sets import CalibrationSet
from quantvla.checkpoint import load_quantized, read_added, read_card
from quantvla.families import load_policy
from quantvla.passes import (
    BalanceOutputs,
    FoldNorms,
    Gptq,
    MatchTemperature,
    Pass,
    RoundWeights,
    Smooth,
)
from quantvla.quantize import quantize
from quantvla.recipe import Recipe, bundled_recipes, read_recipe
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.files import sha256_tree

PASSES: tuple[Pass, ...] = (
    Smooth(exponents=(0.25,)),
    FoldNorms(),
    Gptq(step="layer", too_few="round"),
    MatchTemperature(band=0.0),
    BalanceOutputs(band=0.0),
)


def recipe(passes: tuple[Pass, ...]) -> Recipe:
    base = read_recipe("w4a8")
    return Recipe(name="test", rules=base.rules, default=base.default, passes=passes)


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, tiny_frames: CalibrationSet
) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out"
    quantize(tiny_checkpoint, tiny_frames, recipe(PASSES), output)
    return output


class StopError(Exception):
    pass


@pytest.mark.parametrize(
    ("what", "done"),
    [
        ("calibrating", 2),
        ("folding fold_norms", 1),
        ("rounding weights", 5),
        ("attention temperature", 1),
        ("attention output", 1),
    ],
)
def test_a_run_stopped_in_any_pass_continues_to_the_same_bytes(
    what: str,
    done: int,
    tiny_checkpoint: Path,
    tiny_frames: CalibrationSet,
    whole: Path,
    tmp_path: Path,
) -> None:
    seen: dict[str, int] = {}

    def stop(now: str, _done: int, _total: int) -> None:
        kind = now.split(",")[0]
        seen[kind] = seen.get(kind, 0) + 1
        if kind == what and seen[kind] > done:
            raise StopError

    with pytest.raises(StopError):
        quantize(tiny_checkpoint, tiny_frames, recipe(PASSES), tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    quantize(tiny_checkpoint, tiny_frames, recipe(PASSES), tmp_path / "out")
    assert sha256_tree(tmp_path / "out") == sha256_tree(whole)


def test_a_run_that_continues_does_not_run_the_teacher_again(
    tiny_checkpoint: Path, tiny_frames: CalibrationSet, tmp_path: Path, whole: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def stop(now: str, done: int, _total: int) -> None:
        if now.startswith("attention output") and "teacher" not in now and done == 1:
            raise StopError

    def not_again(*_: object) -> None:
        raise AssertionError

    with pytest.raises(StopError):
        quantize(tiny_checkpoint, tiny_frames, recipe(PASSES), tmp_path / "out", progress=stop)
    with monkeypatch.context() as patched:
        patched.setattr(lockstep, "run_context", not_again)
        quantize(tiny_checkpoint, tiny_frames, recipe(PASSES), tmp_path / "out")
    assert sha256_tree(tmp_path / "out") == sha256_tree(whole)


def test_reports_say_what_every_pass_did(whole: Path) -> None:
    card = read_card(whole)
    assert [report.kind for report in card.reports] == [
        "smooth",
        "fold_norms",
        "gptq",
        "atm",
        "ohb",
    ]
    for report in card.reports[:2]:
        assert report.equivalence is not None and report.equivalence.cosine_min > 0.99999
    assert {site.site for site in card.reports[2].sites} == {e.site for e in card.plan.quantized}
    for report in card.reports[3:]:
        assert report.factors and (report.clip, report.band) == (0.30, 0.0)


def test_corrections_are_in_the_checkpoint_and_in_nothing_else(
    whole: Path, tiny_checkpoint: Path, tiny_frames: CalibrationSet, tmp_path: Path
) -> None:
    quantize(tiny_checkpoint, tiny_frames, recipe(PASSES[:3]), tmp_path / "plain")
    factors = {
        entry.site: entry.applied for report in read_card(whole).reports for entry in report.factors
    }
    before, after = (
        load_file(path / "policy" / "model.safetensors") for path in (tmp_path / "plain", whole)
    )
    corrected = {f"{site}.weight" for site in factors}
    for site, applied in factors.items():
        name = f"{site}.weight"
        expected = torch.tensor(applied).repeat_interleave(len(before[name]) // len(applied))
        assert torch.allclose(after[name], before[name] * expected[:, None], rtol=1e-5)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before.keys() - corrected)


def test_a_parameter_that_a_pass_adds_survives(
    tiny_checkpoint: Path,
    tiny_frames: CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    site = next(
        s for s in load_policy(tiny_checkpoint).used_sites if s.part == "expert" and not s.bias
    )
    bias = torch.linspace(-1, 1, site.out_features)
    original = RoundWeights.__call__

    def and_a_bias(self: RoundWeights, subject: object, progress: object) -> object:
        subject.floats.put_(f"{site.name}.bias", bias)  # type: ignore[attr-defined]
        return original(self, subject, progress)  # type: ignore[arg-type]

    monkeypatch.setattr(RoundWeights, "__call__", and_a_bias)
    quantize(tiny_checkpoint, tiny_frames, read_recipe("rtn-w4a8"), tmp_path / "out")
    assert read_added(tmp_path / "out").keys() == {f"{site.name}.bias"}
    loaded, _ = load_quantized(tmp_path / "out")
    assert torch.equal(loaded.policy.get_submodule(site.name).bias, bias)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", bundled_recipes())
def test_bundled_recipes_are_readable_and_named_after_their_file(name: str) -> None:
    assert read_recipe(name).name == name


def test_recipes_that_are_out_of_order_or_rotate_twice_are_refused(tmp_path: Path) -> None:
    base = read_recipe("quantvla-w4a8")
    text = (Path(__file__).parents[2] / "quantvla/recipes/quantvla-w4a8.toml").read_text()
    path = tmp_path / "wrong.toml"
    path.write_text(text + '\n[[passes]]\nkind = "fold_norms"\n')
    with pytest.raises(
        QuantVLAError, match=r"wrong\.toml: pass fold_norms .* after a correction pass"
    ):
        read_recipe(str(path))
    path.write_text(
        text.replace('kind = "fold_norms"', 'kind = "fold_norms"\n\n[[passes]]\nkind = "rotate"')
    )
    with pytest.raises(QuantVLAError, match=r"wrong\.toml: has pass rotate twice"):
        read_recipe(str(path))
    assert any(step.__struct_config__.tag == "rotate" for step in base.passes)
