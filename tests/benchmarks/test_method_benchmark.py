from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "method" / "run.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("method_benchmark", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_arm_has_a_recipe(script: ModuleType) -> None:
    for name in (*script.RECIPES, *script.VARIANTS):
        recipe = script.recipe_of(name)
        assert recipe.name == name and recipe.passes


def test_arms_are_measured_kept_and_shown(
    script: ModuleType,
    tiny_checkpoint: Path,
    tiny_set: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = [
        "--policy", str(tiny_checkpoint), "--calib", str(tiny_set), "--frames", "4",
        "--work", str(tmp_path / "work"), "-o", str(tmp_path / "result.json"),
    ]  # fmt: skip
    script.main(["rtn-w4a8", *common])
    script.main(["smoothquant-w8a8", *common])
    kept = script.read_results(tmp_path / "result.json")
    assert kept.keys() == {"rtn-w4a8", "smoothquant-w8a8"}
    four, eight = kept["rtn-w4a8"], kept["smoothquant-w8a8"]
    assert 0 < eight.nrmse < four.nrmse
    assert (four.effective_bits, eight.effective_bits) == (4.5, 8.5)
    capsys.readouterr()
    script.main(["--table", *common])
    shown = capsys.readouterr().out
    assert "| rtn-w4a8 |" in shown and "| 1.00 / 1.00 | 4.50 |" in shown
    assert 0 < four.nrmse_median <= 2 * four.nrmse
