from __future__ import annotations

from pathlib import Path

import pytest

from quantvla.families.base import Site
from quantvla.layout import make_plan
from quantvla.recipe import read_recipe
from quantvla.runtime.errors import QuantVLAError
from quantvla.schemes import FLOAT, Scheme


def site(
    name: str, part: str = "llm", role: str = "mlp", width: int = 64, unused: str = ""
) -> Site:
    return Site(
        name=name, stage="prefix", part=part, role=role, kind=name.split(".")[-1], layer=0,
        out_features=8, in_features=width, bias=False, unused=unused,
    )  # fmt: skip


def recipe_file(tmp_path: Path, rules: str, extra: str = "") -> str:
    path = tmp_path / "mine.toml"
    path.write_text(
        f'name = "mine"\n{extra}\n{rules}\n[default]\nscheme = "float"\nreason = "rest"\n'
        '[[passes]]\nkind = "round_weights"\n'
    )
    return str(path)


RULE = '[[rules]]\npart = ["llm"]\nscheme = "w4a8"\nreason = "test"\n'


def test_the_first_matching_rule_decides_and_the_default_takes_the_rest(tmp_path: Path) -> None:
    rules = '[[rules]]\nsite = ["*.down"]\nscheme = "float"\nreason = "sensitive"\n' + RULE
    plan = make_plan(
        [site("a.up"), site("a.down"), site("v.fc", part="vision")],
        read_recipe(recipe_file(tmp_path, rules)),
    )
    assert [entry.scheme.name for entry in plan.entries] == ["w4a8", "float", "float"]
    assert [entry.reason for entry in plan.entries] == ["test", "sensitive", "rest"]


def test_bytes_count_codes_and_scales() -> None:
    scheme = Scheme("w4a8", 4, 8, 32)
    assert scheme.weight_bytes(8, 64) == 8 * 64 // 2 + 8 * 2 * 2
    assert FLOAT.weight_bytes(8, 64) == 8 * 64 * 2


def test_a_site_inference_never_reads_is_dropped(tmp_path: Path) -> None:
    recipe = read_recipe(recipe_file(tmp_path, RULE))
    plan = make_plan([site("a.up"), site("head", unused="never read")], recipe)
    assert plan.entries[1].scheme.name == "dropped" and plan.entries[1].bytes_after == 0
    assert plan.entries[1].reason == "never read"


def test_the_block_is_the_first_that_divides_the_input(tmp_path: Path) -> None:
    rules = RULE + "block = [32, 16]\n"
    plan = make_plan(
        [site("a", width=64), site("b", width=48)], read_recipe(recipe_file(tmp_path, rules))
    )
    assert [entry.scheme.block for entry in plan.entries] == [32, 16]


def test_a_width_no_block_divides_is_an_error_naming_the_site(tmp_path: Path) -> None:
    with pytest.raises(
        QuantVLAError,
        match=r"layer\.odd: its input dimension is not a multiple of the block 32, got 48; add a smaller block",
    ):
        make_plan([site("layer.odd", width=48)], read_recipe(recipe_file(tmp_path, RULE)))


def test_a_rule_that_selects_nothing_is_an_error(tmp_path: Path) -> None:
    rules = RULE + '[[rules]]\npart = ["exprt"]\nscheme = "w4a8"\nreason = "typo"\n'
    with pytest.raises(
        QuantVLAError, match=r"rule part=\['exprt'\]: it selects no site; parts of this policy: llm"
    ):
        make_plan([site("a.up")], read_recipe(recipe_file(tmp_path, rules)))


def test_a_rule_hidden_by_an_earlier_one_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(QuantVLAError, match="taken by an earlier rule"):
        make_plan([site("a.up")], read_recipe(recipe_file(tmp_path, RULE + RULE)))


def test_an_unknown_scheme_offers_the_nearest(tmp_path: Path) -> None:
    rules = RULE.replace("w4a8", "w4a9")
    with pytest.raises(QuantVLAError, match="scheme 'w4a9': unknown; did you mean 'w4a8'"):
        make_plan([site("a.up")], read_recipe(recipe_file(tmp_path, rules)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RULE.replace("part", "prt"), "unknown field `prt`"),
        (RULE.replace('"w4a8"', "4"), "Expected `str`, got `int`"),
        ("rules = 3\n", "not a valid recipe"),
        (RULE + "block = [8]\n", ">= 16"),
        ("[[rules\n", "not a valid recipe"),
    ],
)
def test_a_bad_recipe_names_the_file_and_the_key(tmp_path: Path, text: str, message: str) -> None:
    path = recipe_file(tmp_path, text)
    with pytest.raises(QuantVLAError, match=message) as caught:
        read_recipe(path)
    assert str(caught.value).startswith(path)


def test_unknown_recipe_names(tmp_path: Path) -> None:
    with pytest.raises(QuantVLAError, match="recipe 'w4a9': unknown; did you mean 'w4a8'"):
        read_recipe("w4a9")
    with pytest.raises(QuantVLAError, match="no such file"):
        read_recipe(str(tmp_path / "absent.toml"))


def test_an_unknown_pass_is_refused(tmp_path: Path) -> None:
    path = Path(recipe_file(tmp_path, RULE))
    path.write_text(path.read_text().replace("round_weights", "round_wieghts"))
    with pytest.raises(QuantVLAError, match="round_wieghts"):
        read_recipe(str(path))
