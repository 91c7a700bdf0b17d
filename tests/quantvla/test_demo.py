"""The demo on a tiny random policy and a fake simulator: every artefact, and reuse by a second run."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from quantvla.cli import demo as command
from quantvla.runtime.errors import QuantVLAError

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluate"))
from fake_simulator import FakeSimulator


@pytest.mark.slow
def test_the_demo_leaves_everything_and_reuses_it(
    tiny_checkpoint: Path, tiny_set: Path, tiny_size: Any, tmp_path: Path
) -> None:
    from quantvla.cli.demo_steps import DemoPlan

    robot = FakeSimulator(
        cameras=tiny_size.cameras, state_dim=tiny_size.state_dim, action_dim=tiny_size.action_dim
    )
    plan = DemoPlan(
        checkpoint=tiny_checkpoint,
        calibration=tiny_set,
        directory=tmp_path / "demo",
        episodes=2,
        processes=1,
        film_tasks=("go", "fetch"),
        bench_rounds=1,
        bench_repeats=5,
        simulator=robot,
    )
    assert command.run_demo(plan)
    for name in ("engines/float/manifest.json", "engines/w4a8/manifest.json", "report.html"):
        assert (plan.directory / name).is_file()
    report = json.loads((plan.directory / "report.json").read_text())
    assert [arm["name"] for arm in report["arms"]] == ["float_policy", "float", "w4a8"]
    policy, engine, integer = report["arms"]
    assert integer["memory"]["quantized_parts"] < 0.4 * engine["memory"]["quantized_parts"]
    assert policy["memory"]["files"] > 0 and policy["chunk_ms"]["p50"] > 0
    assert engine["action_error"]["nrmse"] < integer["action_error"]["nrmse"]
    assert list(engine["stages_ms"]) == ["preprocess", "vision", "prefix", "denoise"]
    assert report["sites"] and report["examples"] and len(report["pairs"]) == 3
    assert len(report["steps"]) == 9 and not any(step["reused"] for step in report["steps"])

    assert command.run_demo(plan)
    again = json.loads((plan.directory / "report.json").read_text())
    assert all(step["reused"] for step in again["steps"])
    assert again["arms"] == report["arms"]

    assert command.run_demo(replace(plan, episodes=3))
    more = json.loads((plan.directory / "report.json").read_text())
    assert [step["title"] for step in more["steps"] if not step["reused"]] == [
        "closed loop, 3 episodes of every task, all arms"
    ]


def test_outside_a_clone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("metaworld")
    monkeypatch.setattr(command, "CLONE", tmp_path)
    result = CliRunner().invoke(command.demo, ["-o", str(tmp_path / "out")])
    assert isinstance(result.exception, QuantVLAError)
    assert "run the demo in a clone, or pass --policy.path and --calib" in str(result.exception)
