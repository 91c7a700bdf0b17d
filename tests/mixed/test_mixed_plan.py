"""`quantvla plan` with a budget, from measurement to a recipe that quantizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from quantvla.calib_sets import open_set
from quantvla.cli.plan import plan
from quantvla.families import load_policy
from quantvla.layout import make_plan
from quantvla.mixed.recipe_file import mixed_recipe, write_recipe
from quantvla.mixed.sensitivity import Sensitivity, Subject
from quantvla.quantize import quantize
from quantvla.recipe import read_recipe
from quantvla.runtime.errors import QuantVLAError
from quantvla.schemes import FLOAT, Scheme

FORMATS = ("w4a8:16", "w4a8:32", "w8a8:32")
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def subject(tiny_checkpoint: Path, tiny_set: Path) -> Subject:
    calibration = open_set(tiny_set).part("calibration")
    return Subject(load_policy(tiny_checkpoint), "0" * 64, calibration, calibration, seed=0)


@pytest.fixture(scope="module")
def base_recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a recipe with few integer sites, so that trying all of them is quick."""
    path = tmp_path_factory.mktemp("recipe") / "base.toml"
    path.write_text(
        'name = "base"\n[[rules]]\npart = ["expert"]\nrole = ["mlp"]\nscheme = "w4a8"\n'
        'block = [32, 16]\nreason = "test"\n[default]\nscheme = "float"\nreason = "rest"\n'
        '[[passes]]\nkind = "round_weights"\n'
    )
    return str(path)


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path, tiny_set: Path, cache: Path, base_recipe: str) -> Run:
    def call(*arguments: str, calib: bool = True) -> Result:
        given = [
            "--policy.path", str(tiny_checkpoint), "--cache", str(cache), "--probe-frames", "4", "--recipe", base_recipe,
            *[part for form in FORMATS for part in ("--format", form)],
        ]  # fmt: skip
        given += ["--calib", str(tiny_set)] if calib else []
        return CliRunner().invoke(plan, [*given, *arguments])

    return call


def ignore(_what: str, _done: int, _total: int) -> None:
    pass


@pytest.fixture(scope="module")
def uniform_mib(tiny_checkpoint: Path, base_recipe: str) -> float:
    made = make_plan(load_policy(tiny_checkpoint).sites, read_recipe(base_recipe))
    return sum(entry.bytes_after for entry in made.quantized) / 2**20


@pytest.fixture(scope="module")
def solved(run: Run, uniform_mib: float, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plan with a fifth more bytes than the base: directory with plan.json, mixed.toml and plot.png."""
    directory = tmp_path_factory.mktemp("solved")
    result = run(
        "--budget-mb", repr(1.2 * uniform_mib), "-o", str(directory / "mixed.toml"),
        "--plot", str(directory / "plot.png"), "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.exception
    (directory / "plan.json").write_text(result.stdout)
    return directory


def test_the_mixture_keeps_the_budget_and_spends_it_on_less_error(
    solved: Path, uniform_mib: float
) -> None:
    found = json.loads((solved / "plan.json").read_text())
    assert uniform_mib < found["chosen"]["mib"] <= 1.2 * uniform_mib
    assert found["base"]["mib"] == pytest.approx(uniform_mib)
    assert found["chosen"]["predicted_nrmse"] < found["base"]["predicted_nrmse"]
    assert found["chosen"]["measured_nrmse"] > 0
    errors = [point["predicted_nrmse"] for point in found["frontier"]]
    assert errors == sorted(errors, reverse=True)
    assert len({site["format"] for site in found["sites"]}) > 1


def test_the_recipe_gives_every_site_its_format_and_quantizes(
    solved: Path, tiny_checkpoint: Path, tiny_set: Path, tmp_path: Path
) -> None:
    recipe = read_recipe(str(solved / "mixed.toml"))
    planned = {
        s["site"]: s["format"] for s in json.loads((solved / "plan.json").read_text())["sites"]
    }
    made = make_plan(load_policy(tiny_checkpoint).sites, recipe)
    assert {
        entry.site: f"{entry.scheme.name}:{entry.scheme.block}" for entry in made.quantized
    } == planned
    result = quantize(
        tiny_checkpoint, open_set(tiny_set).part("calibration"), recipe, tmp_path / "mixed"
    )
    assert {entry.site for entry in result.plan.quantized} == planned.keys()


def test_the_plot_is_a_picture(solved: Path) -> None:
    with Image.open(solved / "plot.png") as image:
        assert image.format == "PNG" and image.width > 500


def test_errors_are_measured_once(
    run: Run, uniform_mib: float, monkeypatch: pytest.MonkeyPatch, solved: Path
) -> None:
    def never(*_: object) -> float:
        raise AssertionError("measured again")

    monkeypatch.setattr(Sensitivity, "measure", never)
    result = run("--budget-mb", repr(1.2 * uniform_mib))
    assert result.exit_code == 0, result.exception
    assert "chosen formats" in result.stdout and "nrmse predicted" in result.stdout


def test_an_infeasible_budget_names_the_smallest_before_anything_is_measured(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantvla.mixed.make.Sensitivity", None)
    result = run("--budget-mb", "0.001")
    assert isinstance(result.exception, QuantVLAError)
    message = str(result.exception)
    assert message.startswith(
        "budget of weights with their scales: no choice of formats is that small"
    )
    least = message.rsplit("the smallest feasible budget is ", 1)[1].removesuffix(" MiB")
    feasible = run("--budget-mb", least)
    assert not isinstance(feasible.exception, QuantVLAError)  # goes on to what is patched away


@pytest.mark.parametrize(
    ("arguments", "calib", "message"),
    [
        (["--budget-mb", "1"], False, "a budget needs calibration data; give --calib SET"),
        (["-o", "x.toml"], True, "belong to a budget; give --budget-mb or --budget-ms"),
        (["--latency"], False, "belong to a budget; give --budget-mb or --budget-ms"),
        (["--budget-mb", "1", "--target", "rtx"], True, "got --target rtx; plan without --target"),
        (["--budget-mb", "1", "-o", "x.json"], True, "a recipe's file ends in .toml"),
    ],
)
def test_options_that_do_not_go_together(
    run: Run, arguments: list[str], calib: bool, message: str
) -> None:
    result = run(*arguments, calib=calib)
    assert isinstance(result.exception, QuantVLAError) and message in str(result.exception)


def test_no_budget_below_zero(run: Run) -> None:
    assert run("--budget-mb", "-1").exit_code == 2
    assert run("--budget-ms", "0").exit_code == 2


def test_more_bits_at_a_site_mean_less_error_of_the_action(
    subject: Subject, tmp_path: Path
) -> None:
    made = make_plan(subject.loaded.sites, read_recipe("w4a8"))
    entry = next(e for e in made.quantized if e.part == "expert" and e.kind == "down_proj")
    four = [Scheme("w4a8", 4, 8, block) for block in (16, 64) if entry.in_features % block == 0]
    eight = [Scheme("w8a8", 8, 8, 16)]
    found = Sensitivity(subject, tmp_path, ignore).errors([(entry, [*four, *eight, FLOAT])])
    errors = list(found.values())
    assert errors[-1] == 0.0 < errors[-2] * 4 < min(errors[:-2])


def test_a_site_is_float_again_after_it_was_tried(subject: Subject, tmp_path: Path) -> None:
    made = make_plan(subject.loaded.sites, read_recipe("w4a8"))
    sensitivity = Sensitivity(subject, tmp_path, ignore)
    choice = {entry.site: (entry, entry.scheme) for entry in made.quantized[:3]}
    first = sensitivity.measure(choice)
    modules: list[Any] = [subject.loaded.policy.get_submodule(site) for site in choice]
    assert all(type(module).__name__ == "Linear" for module in modules)
    assert sensitivity.measure(choice) == first > 0
    floats = {site: (entry, FLOAT) for site, (entry, _) in choice.items()}
    assert sensitivity.measure(floats) == 0.0


def test_errors_of_another_seed_are_not_taken(subject: Subject) -> None:
    assert replace(subject, seed=1).key() != subject.key()
    assert replace(subject, checkpoint_sha256="1" * 64).key() != subject.key()


def test_base_rules_that_decide_nothing_more_are_left_out(subject: Subject, tmp_path: Path) -> None:
    base = read_recipe("w4a8")
    made = make_plan(subject.loaded.sites, base)
    choice = {entry.site: (entry, entry.scheme) for entry in made.quantized}
    recipe = mixed_recipe("mine", base, choice, subject.loaded.sites)
    write_recipe(tmp_path / "mine.toml", recipe, ("a remark",))
    assert (tmp_path / "mine.toml").read_text().startswith("# a remark\n")
    again = read_recipe(str(tmp_path / "mine.toml"))
    assert again == recipe
    remade = make_plan(subject.loaded.sites, again)
    assert [(e.site, e.scheme) for e in remade.entries] == [
        (e.site, e.scheme) for e in made.entries
    ]
