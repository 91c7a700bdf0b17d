"""The committed GR00T: what a user does with a trained checkpoint, and that its engine solves tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from quantvla.cli.main import cli

ROOT = Path(__file__).parents[2]
POLICY = ROOT / "examples" / "metaworld" / "policy_groot"
SET = ROOT / "calib_sets" / "metaworld"


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.slow
def test_the_trained_policy_compiles_passes_and_acts(tmp_path: Path) -> None:
    pytest.importorskip("metaworld")
    quantized, engine = tmp_path / "quantized", tmp_path / "engine"
    run("quantize", "--policy.path", POLICY, "--calib", SET, "--frames", 9, "--recipe", "layout-w4a8", "-o", quantized)  # fmt: skip
    run("export", quantized, "-o", engine)
    found = json.loads(run("verify", engine, "--policy.path", POLICY, "--quantized", quantized, "--frames", 4, "--json").stdout)  # fmt: skip
    assert found["pass"] and 0.001 < found["quantization"]["nrmse"] < 0.3
    outcome = json.loads(run("eval", f"w4a8={engine}", "--tasks", "drawer-close-v3,window-open-v3", "--episodes", 2, "-o", tmp_path / "eval", "--json").stdout)  # fmt: skip
    assert outcome["arms"]["w4a8"]["successes"] >= 3
