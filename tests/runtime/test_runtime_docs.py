"""The snippets of docs/runtime.md, in their order."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_engine import observation

from quantvla.cli.main import cli
from quantvla.runtime.control.limits import read_limits
from quantvla.runtime.manifest import ActionSpec

PAGE = (Path(__file__).parents[2] / "docs" / "runtime.md").read_text()


def snippet(name: str) -> str:
    (found,) = re.findall(rf"<!-- test: {name} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    return str(found)


def test_python_from_policy_to_loop(
    pristine_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"ENGINE": pristine_engine, "OBSERVATION": observation()}
    code = "".join(snippet(name) for name in ("policy", "robot", "loop"))
    exec(compile(code, "docs/runtime.md", "exec"), names)
    report = names["report"]
    assert report.ticks > 0 and report.stop_cause == "time is up"  # type: ignore[attr-defined]
    assert "time is up" in capsys.readouterr().out
    names["policy"].close()  # type: ignore[attr-defined]


def test_the_limits_file_is_one(tmp_path: Path) -> None:
    (tmp_path / "limits.json").write_text(snippet("limits"))
    action = ActionSpec(horizon=1, execute=1, dim=2, names=("shoulder", "gripper"))
    assert read_limits(tmp_path / "limits.json", action).joints[1].seam == 0.1


def test_the_run_file_runs_and_its_trace_replays(pristine_engine: Path, tmp_path: Path) -> None:
    recorded = tmp_path / "set"
    recorded.mkdir()
    for index in range(8):
        np.savez(
            recorded / f"{index}.npz", **observation(index), episode=index // 2, frame=index % 2
        )
    text = snippet("run").replace("ENGINE", str(pristine_engine)).replace("SET", str(recorded))
    (tmp_path / "run.toml").write_text(text)
    done = CliRunner().invoke(
        cli, ["run", "--config", str(tmp_path / "run.toml"), "--json"], catch_exceptions=False
    )
    report = json.loads(done.stdout)
    assert done.exit_code == 0 and report["ticks"] + report["skipped_ticks"] == 100
    again = CliRunner().invoke(
        cli, ["replay", str(tmp_path / "trace.jsonl")], catch_exceptions=False
    )
    assert again.exit_code == 0, again.output
