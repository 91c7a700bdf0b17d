"""Traces: complete, replayable bit for bit, and never in the loop's way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_robot import FakeRobot, RampPolicy, make_loop
from tiny_engine import CAMERAS, change_manifest, observation

from quantvla.runtime.control.clock import VirtualClock
from quantvla.runtime.control.guard import MotionGuard
from quantvla.runtime.control.limits import limits_from_manifest
from quantvla.runtime.control.loop import ControlLoop
from quantvla.runtime.control.replay import replay
from quantvla.runtime.control.spec import StrategySpec, build_strategy
from quantvla.runtime.control.strategy import Asynchronous
from quantvla.runtime.control.trace import (
    EndRecord,
    EventRecord,
    Header,
    InferenceRecord,
    TickRecord,
    TraceWriter,
    observations_file,
)
from quantvla.runtime.control.trace_reader import load_observation, read_header, read_records
from quantvla.runtime.control.worker import DelayedWorker
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.files import sha256_file
from quantvla.runtime.policy import Policy

RATE_HZ = 20.0


class SeeingRobot:
    """Sees another random picture every time."""

    def __init__(self) -> None:
        self.seen: list[dict[str, object]] = []
        self.actions: list[np.ndarray] = []

    def observe(self) -> dict[str, object]:
        self.seen.append(observation(len(self.seen)))
        return self.seen[-1]

    def act(self, action: np.ndarray) -> None:
        self.actions.append(action)

    def stop(self) -> None:
        pass


@pytest.fixture
def record(pristine_engine: Path, tmp_path: Path) -> Callable[..., tuple[Path, SeeingRobot]]:
    def make(spec: StrategySpec, *, ticks: int = 24, delay: int = 1) -> tuple[Path, SeeingRobot]:
        path, robot = tmp_path / "run" / "trace.jsonl", SeeingRobot()
        with Policy.from_pretrained(pristine_engine, threads=1) as policy:
            header = Header(
                engine=str(pristine_engine),
                manifest_sha256=sha256_file(pristine_engine / "manifest.json"),
                threads=1,
                versions=policy.versions,
                strategy=spec,
                rate_hz=RATE_HZ,
                joints=("a", "b"),
                started="now",
            )
            trace = TraceWriter(path, header)
            loop = ControlLoop(
                robot,
                build_strategy(spec, policy),
                rate_hz=RATE_HZ,
                guard=MotionGuard(limits_from_manifest(policy.manifest), RATE_HZ),
                trace=trace,
                clock=VirtualClock(),
                worker=lambda s: DelayedWorker(s.predict, delay),
                seed=3,
            )
            loop.run(ticks=ticks)
            trace.close()
        return path, robot

    return make


@pytest.mark.parametrize("kind", ["sync", "async", "blend", "rtc"])
def test_a_trace_replays_bit_for_bit(record: Callable[..., Any], kind: Any) -> None:
    path, _ = record(StrategySpec(kind=kind, execute=2))
    report = replay(path)
    assert report.passed and report.same_engine and report.same_versions and report.complete
    assert report.identical == len(report.inferences) > 5


def test_a_trace_holds_every_tick_and_what_the_policy_saw(record: Callable[..., Any]) -> None:
    path, robot = record(StrategySpec(kind="rtc", execute=2))
    header, *records = read_records(path)
    assert isinstance(header, Header) and isinstance(records[-1], EndRecord)
    ticks = [r for r in records if isinstance(r, TickRecord)]
    assert [t.tick for t in ticks] == list(range(24))
    assert np.array_equal(np.float32([t.sent for t in ticks]), np.stack(robot.actions))
    first = next(r for r in records if isinstance(r, InferenceRecord))
    seen = load_observation(path, first)
    for key in (*CAMERAS, "observation.state", "task"):
        assert np.array_equal(seen[key], robot.seen[0][key])


def test_replay_shows_a_change_of_the_engine(
    record: Callable[..., Any], engine: Path, pristine_engine: Path
) -> None:
    path, _ = record(StrategySpec(kind="async", execute=2))
    manifest = change_manifest(engine)
    other = {**manifest.statistics}
    change_manifest(engine, statistics={**other, "action": _shifted(other["action"])})
    report = replay(path, engine=engine)
    assert not report.passed and not report.same_engine and report.identical == 0
    assert report.inferences[0].max_abs == pytest.approx(1e-3, rel=0.1)
    assert replay(path, engine=engine, tolerance=2e-3).passed


def _shifted(statistics: Any) -> Any:
    import msgspec

    return msgspec.structs.replace(statistics, mean=tuple(m + 1e-3 for m in statistics.mean))


def test_an_engine_that_failed_is_replayed_as_failing(record: Callable[..., Any]) -> None:
    path, _ = record(StrategySpec(kind="async", execute=2))
    lines = path.read_text().splitlines()
    broken = [json.loads(line) for line in lines]
    for entry in broken:
        if entry["kind"] == "inference" and entry["index"] == 1:
            entry.update(chunk=None, error="it failed")
    path.write_text("".join(json.dumps(entry) + "\n" for entry in broken))
    report = replay(path)
    assert not report.passed and [i.index for i in report.inferences if not i.identical] == [1]


def test_an_engine_that_fails_only_now_says_why(
    record: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = record(StrategySpec(kind="async", execute=2))

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(Policy, "predict_action_chunk", fail)
    report = replay(path)
    assert not report.passed and {one.error for one in report.inferences} == {"no memory"}


def test_a_trace_cut_by_a_kill_is_read_up_to_there(record: Callable[..., Any]) -> None:
    path, _ = record(StrategySpec(kind="async", execute=2))
    path.write_bytes(path.read_bytes()[:-200])
    report = replay(path)
    assert report.passed and not report.complete


def test_files_that_are_no_trace(record: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(QuantVLAError, match="no such file; give the trace"):
        replay(tmp_path / "none.jsonl")
    other = tmp_path / "other.jsonl"
    other.write_text('{"kind": "event", "tick": 0, "text": ""}\n')
    with pytest.raises(QuantVLAError, match="not a trace: its first line is no header"):
        read_header(other)
    other.write_text("hello\n")
    with pytest.raises(QuantVLAError, match="line 1: not a trace record"):
        read_header(other)
    path, _ = record(StrategySpec(kind="async", execute=2))
    observations_file(path).write_bytes(b"")
    with pytest.raises(QuantVLAError, match="is cut short; copy it again"):
        replay(path)
    observations_file(path).unlink()
    with pytest.raises(QuantVLAError, match="is missing; copy it together with the trace"):
        replay(path)
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(QuantVLAError, match="holds no inference; record a longer run"):
        replay(path)
    path.write_text(path.read_text().replace('"version":1', '"version":9'))
    with pytest.raises(QuantVLAError, match="expected trace version 1, got 9"):
        replay(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_loses_the_trace_and_not_the_robot(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    header = Header(
        engine="e", manifest_sha256="", threads=1, versions={}, strategy=None,
        rate_hz=10.0, joints=("j0", "j1"), started="now",
    )  # fmt: skip
    trace = TraceWriter(tmp_path / "trace.jsonl", header)
    trace._lines.close()
    trace._lines = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115  from here on it is full
    robot = FakeRobot(VirtualClock())
    report = make_loop(Asynchronous(RampPolicy(), 4), robot, trace=trace).run(ticks=50)
    trace.close()
    assert len(robot.actions) == 50 and not report.failed
    assert trace.lost() > 50 and "the trace is incomplete from here on" in caplog.text
    assert [type(r) for r in read_records(trace.path)] == [Header]


def test_a_disk_that_hangs_loses_records_and_not_ticks(tmp_path: Path, monkeypatch: Any) -> None:
    import threading

    from quantvla.runtime.control import trace as trace_module

    gate = threading.Event()
    monkeypatch.setattr(trace_module, "_QUEUE", 10)
    monkeypatch.setattr(trace_module, "_write_all", lambda stream, data: gate.wait(20.0))
    header = Header(
        engine="e", manifest_sha256="", threads=1, versions={}, strategy=None,
        rate_hz=10.0, joints=(), started="now",
    )  # fmt: skip
    trace = TraceWriter(tmp_path / "trace.jsonl", header)
    for tick in range(100):
        trace.write(EventRecord(tick=tick, text="busy"))
    assert trace.lost() >= 85
    gate.set()
    trace.close()


def test_a_file_that_cannot_be_closed_counts_as_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    header = Header(
        engine="e", manifest_sha256="", threads=1, versions={}, strategy=None,
        rate_hz=10.0, joints=(), started="now",
    )  # fmt: skip
    trace = TraceWriter(tmp_path / "trace.jsonl", header)

    class Refusing:
        def close(self) -> None:
            raise OSError("quota")

    trace._arrays.close()
    monkeypatch.setattr(trace, "_arrays", Refusing())
    trace.close()
    assert trace.lost() == 1 and "incomplete from here on: quota" in caplog.text


def test_own_strategies_cannot_be_replayed(tmp_path: Path) -> None:
    header = Header(
        engine="e", manifest_sha256="", threads=1, versions={}, strategy=None,
        rate_hz=10.0, joints=(), started="now",
    )  # fmt: skip
    TraceWriter(tmp_path / "trace.jsonl", header).close()
    with pytest.raises(QuantVLAError, match="was recorded with a strategy of its own"):
        replay(tmp_path / "trace.jsonl")
