"""`quantvla run` and `quantvla replay` from their files to their exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tiny_engine import observation

from quantvla.cli.main import cli
from quantvla.robots.opening import opened_robot
from quantvla.run_config import PythonSpec, RecordedSpec, read_run_config
from quantvla.runtime.control.robot import FinishedError
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.manifest import read_manifest

OWN_ROBOT = """
import numpy as np
log = []
class Robot:
    def __init__(self, fail_at=-1):
        self.fail_at = fail_at
    def observe(self):
        from tiny_engine import observation
        return observation(len(log))
    def act(self, action):
        if len(log) == self.fail_at:
            raise OSError("no bus")
        log.append(action)
    def stop(self):
        log.append("stop")
def lame():
    return object()
"""


@pytest.fixture
def own_robot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "own_robot.py").write_text(OWN_ROBOT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own_robot", raising=False)
    import own_robot  # type: ignore[import-not-found]

    return own_robot


@pytest.fixture
def run_file(pristine_engine: Path, tmp_path: Path) -> Callable[..., Path]:
    def write(text: str = "", options: str = "") -> Path:
        path = tmp_path / "run.toml"
        path.write_text(
            f'engine = "{pristine_engine}"\nthreads = 1\n'
            f'[robot]\nkind = "python"\nfactory = "own_robot:Robot"\noptions = {{ {options} }}\n'
            '[loop]\nrate_hz = 20\nseconds = 1\nclock = "virtual"\ndelay_ticks = 1\n' + text
        )
        return path

    return write


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)


def test_a_run_reports_and_its_trace_replays(
    run_file: Callable[..., Path], own_robot: Any, tmp_path: Path
) -> None:
    path = run_file('[log]\ntrace = "out/trace.jsonl"\n')
    done = run("run", "--config", path, "--json")
    report = json.loads(done.stdout)
    assert done.exit_code == 0 and report["ticks"] == 20 and report["stop_cause"] == "time is up"
    assert len(own_robot.log) == 21 and own_robot.log[-1] == "stop"
    trace = tmp_path / "out" / "trace.jsonl"
    again = run("replay", trace)
    assert again.exit_code == 0 and "inferences identical" in again.stdout
    as_json = json.loads(run("replay", trace, "--json").stdout)
    assert as_json["same_engine"] and all(i["identical"] for i in as_json["inferences"])


def test_what_is_not_bounded_is_said(run_file: Callable[..., Path], own_robot: Any) -> None:
    done = run("run", "--config", run_file())
    assert "limits from action statistics of the engine; not bounded: velocity, acceleration" in (
        " ".join(done.stderr.split())
    )
    assert "20 ticks at 20 Hz" in done.stdout and "jitter, ms" in done.stdout


def test_dry_run_shows_actions_and_sends_none(
    run_file: Callable[..., Path], own_robot: Any
) -> None:
    done = run("run", "--config", run_file(), "--dry-run")
    assert done.exit_code == 0 and own_robot.log == []
    assert "tick 0: +" in done.stdout or "tick 0: -" in done.stdout
    assert "dry run: nothing is sent" in done.stdout


def test_a_robot_that_fails_is_exit_code_1(run_file: Callable[..., Path], own_robot: Any) -> None:
    done = run("run", "--config", run_file(options="fail_at = 5"))
    assert done.exit_code == 1 and "FAILED: robot act failed: no bus" in done.stdout
    assert own_robot.log[-1] == "stop" and len(own_robot.log) == 6


def test_a_limits_file_guards_the_run(
    run_file: Callable[..., Path], own_robot: Any, tmp_path: Path
) -> None:
    joints = [{"name": "0", "upper": 9.0, "velocity": 1.0}, {"name": "1"}]
    (tmp_path / "limits.json").write_text(json.dumps({"joints": joints}))
    done = run(
        "run", "--config", run_file('[guard]\nlimits = "limits.json"\nkill_after = 0\n'), "--json"
    )
    sent = np.stack(own_robot.log[:-1])
    assert sent[:, 0].max() <= 9.0 and np.abs(np.diff(sent[:, 0])).max() <= 1 / 20 + 1e-4
    assert json.loads(done.stdout)["interventions"].keys() >= {"velocity"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[strategy]\nkind = 'rt'\n", "not a valid run file .*rt"),
        ("[guard]\nmod = 'clamp'\n", "not a valid run file .*unknown field `mod`"),
        ("[watchdog]\nhold_s = 0\n", "not a valid run file"),
        ("[strategy]\nkind = 'async'\nblend = 6\n", "`blend` is for kind 'blend', not 'async'"),
        ("[strategy]\nkind = 'sync'\nmax_weight = 5.0\n", "`max_weight` is for kind 'rtc', not 'sync'"),
        ("[log]\nrerun = 'r.rrd'\n", "`rerun` is made from the trace"),
        ("[guard]\ndegrees = true\n", "`degrees` is for `urdf`, which is not given"),
        ("[strategy]\nexecute = 99\n", "strategy execute: expected 1 to 4 actions of a chunk, got 99"),
        ("[strategy]\nguidance = 'vjp'\n", "has no graph for guidance 'vjp'; export it with --guidance"),
        ("[guard]\nlimits = 'a'\nurdf = 'b'\n", "guard: limits and urdf are both given"),
    ],
)  # fmt: skip
def test_wrong_run_files_are_refused_before_the_robot_moves(
    run_file: Callable[..., Path], own_robot: Any, text: str, message: str
) -> None:
    with pytest.raises(QuantVLAError, match=message):
        run("run", "--config", run_file(text))
    assert own_robot.log == []


def test_a_delay_of_the_real_clock_is_refused(
    run_file: Callable[..., Path], own_robot: Any
) -> None:
    path = run_file()
    path.write_text(path.read_text().replace("virtual", "real"))
    with pytest.raises(QuantVLAError, match="`delay_ticks` is for clock 'virtual'"):
        run("run", "--config", path)


def test_what_a_cascade_did_is_reported(run_file: Callable[..., Path], own_robot: Any) -> None:
    path = run_file("[cascade]\nthreshold = 0.0\nsteps = 1\nbudget_ms = 1e-6\n")
    done = run("run", "--config", path, "--json")
    counts = json.loads(done.stdout)["cascade"]
    assert counts["no_time"] == counts["chunks"] > 1 and counts["escalated"] == 0
    assert "0 of" in (text := run("run", "--config", path).stdout) and "for want of time" in text


@pytest.mark.parametrize("budget", ["", "budget_ms = 1e-6\n", "budget_ms = 1e6\n"])
def test_a_cascade_replays_what_the_clock_decided(
    run_file: Callable[..., Path], own_robot: Any, tmp_path: Path, budget: str
) -> None:
    cascade = f"[cascade]\nthreshold = 0.0\nsteps = 1\n{budget}"
    run("run", "--config", run_file(f"[log]\ntrace = 'trace.jsonl'\n{cascade}"))
    trace = tmp_path / "trace.jsonl"
    answers = {json.loads(line).get("answer") for line in trace.open() if "inference" in line}
    assert {"no time" if "1e-6" in budget else "better"} == answers - {None}
    again = run("replay", trace, "--json")
    assert again.exit_code == 0
    assert all(one["identical"] for one in json.loads(again.stdout)["inferences"])


def test_a_trace_becomes_a_rerun_recording(
    run_file: Callable[..., Path], own_robot: Any, tmp_path: Path
) -> None:
    path = run_file("[log]\ntrace = 'trace.jsonl'\nrerun = 'shown/run.rrd'\n")
    assert run("run", "--config", path).exit_code == 0
    recording = (tmp_path / "shown" / "run.rrd").read_bytes()
    header = json.loads((tmp_path / "trace.jsonl").open().readline())
    entities = [
        f"/{entity}/{j}:Scalars" for entity in ("planned", "sent") for j in header["joints"]
    ]
    for entity in ("/late_ms:Scalars", "/latency_ms:Scalars", ":Image:buffer", *entities):
        assert entity.encode() in recording


def test_a_rerun_recording_needs_its_library(
    run_file: Callable[..., Path], own_robot: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rerun", None)
    with pytest.raises(
        QuantVLAError, match=r"rerun: is not installed.*pip install 'quantvla\[rerun\]'"
    ):
        run("run", "--config", run_file("[log]\ntrace = 't.jsonl'\nrerun = 'r.rrd'\n"))
    assert own_robot.log == []


def test_missing_run_file_and_unwritable_trace(
    run_file: Callable[..., Path], own_robot: Any, tmp_path: Path
) -> None:
    with pytest.raises(QuantVLAError, match="no such file; give a run file"):
        run("run", "--config", tmp_path / "none.toml")
    (tmp_path / "file").write_text("")
    with pytest.raises(QuantVLAError, match="the trace cannot be written"):
        run("run", "--config", run_file(), "--trace", tmp_path / "file" / "trace.jsonl")


def test_factories_are_checked(pristine_engine: Path, own_robot: Any) -> None:
    manifest = read_manifest(pristine_engine)
    for factory, message in (
        ("own_robot:none", "expected 'module:callable' that can be imported, got 'own_robot:none'"),
        ("no_such_module:x", "expected 'module:callable' that can be imported"),
        ("own_robot:lame", "robot 'own_robot:lame': has no observe, act, stop"),
    ):
        with (
            pytest.raises(QuantVLAError, match=message),
            opened_robot(PythonSpec(factory=factory), manifest),
        ):
            pass


def test_paths_of_a_run_file_are_seen_from_it(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "run.toml"
    path.parent.mkdir()
    path.write_text(
        'engine = "../e"\n[robot]\nkind = "recorded"\npath = "set"\n[log]\ntrace = "/t"\n'
    )
    config = read_run_config(path)
    assert config.engine.resolve() == tmp_path / "e" and config.log.trace == Path("/t")
    assert isinstance(config.robot, RecordedSpec)
    assert config.robot.path.resolve() == tmp_path / "sub" / "set"


@pytest.fixture
def recorded_set(tmp_path: Path) -> Path:
    directory = tmp_path / "set"
    directory.mkdir()
    for index in range(12):
        np.savez(
            directory / f"{index:03d}.npz",
            **observation(index),
            episode=index // 4,
            frame=index % 4,
        )
    return directory


def test_the_recorded_robot_shows_frames_one_per_action(
    recorded_set: Path, pristine_engine: Path
) -> None:
    manifest = read_manifest(pristine_engine)
    with opened_robot(RecordedSpec(path=recorded_set, frames=5, repeat=False), manifest) as robot:
        first = robot.observe()
        assert np.allclose(first["observation.state"], observation(0)["observation.state"])
        for _ in range(5):
            robot.observe()
            robot.act(np.zeros(2, np.float32))
        with pytest.raises(FinishedError, match="the recording is at its end"):
            robot.observe()
    with opened_robot(RecordedSpec(path=recorded_set, frames=1), manifest) as robot:
        robot.act(np.zeros(2, np.float32))
        assert np.allclose(robot.observe()["observation.state"], first["observation.state"])
