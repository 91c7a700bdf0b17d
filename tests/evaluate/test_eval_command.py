"""``quantvla eval`` on a fake simulator: arguments, JSON, tables, files."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fake_simulator import FakeSimulator, load

from quantvla.cli.eval import evaluate
from quantvla.evaluate import closed_loop, rollouts
from quantvla.evaluate.environment import MetaWorld
from quantvla.runtime.errors import QuantVLAError

CONFIG = {
    "type": "smolvla",
    "input_features": {
        "observation.images.front": {"type": "VISUAL", "shape": [3, 8, 8]},
        "observation.state": {"type": "STATE", "shape": [2]},
    },
    "output_features": {"action": {"type": "ACTION", "shape": [2]}},
    "chunk_size": 4,
    "n_action_steps": 2,
    "max_action_dim": 3,
}


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of the fake robot; the command runs it in the fake simulator."""
    directory = tmp_path / "policy"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "model.safetensors").write_bytes(b"")
    for module, name in ((closed_loop, "evaluate"), (rollouts, "record_rollouts")):
        monkeypatch.setattr(module, name, in_the_fake_simulator(getattr(module, name)))
    return directory


def in_the_fake_simulator(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` with the fake simulator, perturbed as the one it is called with."""

    def fake(*given: Any, simulator: MetaWorld, **options: Any) -> Any:
        changed = FakeSimulator(perturbation=simulator.perturbation)
        return function(*given, simulator=changed, load=load, **options)

    return fake


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(evaluate, list(arguments))
    if isinstance(result.exception, QuantVLAError):
        raise result.exception
    return result


def test_json(checkpoint: Path) -> None:
    arms = (f"good={checkpoint}", f"bad={checkpoint}")
    result = invoke(*arms, "--tasks", "go,fetch", "--episodes", "5", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found["arms"]) == {"good", "bad"}
    for arm in found["arms"].values():
        assert {"episodes", "successes", "rate", "ci95", "tasks"} <= set(arm)
        assert set(arm["tasks"]) == {"go", "fetch"}
        assert set(arm["tasks"]["go"]) == {"episodes", "successes", "rate", "ci95"}
        assert arm["episodes"] == 10
    (pair,) = found["pairs"]
    expected = {"a", "b", "both", "only_a", "only_b", "neither", "difference", "ci95", "mcnemar_p"}
    assert set(pair) == expected
    assert found["seed"] == 0 and found["shared_noise"] and "quantvla" in found["versions"]


def test_perturbation_and_steps_are_in_the_result(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    output = ("-o", str(tmp_path / "out"))
    arguments = (f"a={checkpoint}", "--episodes", "2", "--perturb", "camera=0.1", "--steps", "4")
    result = invoke(*arguments, *output)
    assert "The tasks are changed: camera 0.1, 4 denoise steps" in result.stdout
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["perturbation"] == {"camera": 0.1} and found["denoise_steps"] == 4
    assert {"jerk", "step", "seam", "overlap", "seams"} == set(found["arms"]["a"]["smoothness"])
    with pytest.raises(QuantVLAError, match="another evaluation: denoise_steps expected 2, got 4"):
        invoke(*arguments[:-1], "2", *output)
    with pytest.raises(QuantVLAError, match=r"evaluation: perturbation expected {}, got"):
        invoke(f"a={checkpoint}", "--episodes", "2", *output)


def test_tables(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    result = invoke(f"good={checkpoint}", f"bad={checkpoint}", "--episodes", "3")
    assert "9/9  100 %" in result.stdout
    assert "bad - good" in result.stdout
    assert "McNemar" in result.stdout


def test_output_directory_with_film(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arms = (f"good={checkpoint}", f"bad={checkpoint}")
    result = invoke(*arms, "--episodes", "2", "-o", str(output), "--film", "--json")
    names = sorted(path.name for path in output.iterdir())
    assert names == ["episodes.jsonl", "evaluation.json", "film.gif"]
    assert json.loads((output / "evaluation.json").read_text()) == json.loads(result.stdout)


@pytest.mark.parametrize("argument", ["policy", "=policy", "float=", ""])
def test_an_arm_without_a_name(argument: str) -> None:
    with pytest.raises(QuantVLAError, match=r"arm: expected NAME=DIRECTORY, got .*; write for"):
        invoke(argument)


def test_duplicate_names(checkpoint: Path) -> None:
    with pytest.raises(QuantVLAError, match="arms: name used twice, got 'a'"):
        invoke(f"a={checkpoint}", f"a={checkpoint}")


def test_unknown_task(checkpoint: Path) -> None:
    with pytest.raises(QuantVLAError, match="got 'fetc'; did you mean 'fetch'"):
        invoke(f"a={checkpoint}", "--tasks", "fetc")


def test_film_without_output(checkpoint: Path) -> None:
    with pytest.raises(QuantVLAError, match="--film: has no place to go; give an output"):
        invoke(f"a={checkpoint}", "--film")


def test_simulator_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(QuantVLAError, match=r"not installed; run `pip install quantvla\[sim\]`"):
        MetaWorld().check_installed()
