"""What `quantvla run` shows while it runs and when it has ended."""

from __future__ import annotations

from pathlib import Path

from fake_robot import RATE_HZ, FakeRobot, RampPolicy, make_limits, make_loop
from rich.console import Console

from quantvla.cli.live_view import live_view, render, report_lines, report_table
from quantvla.run_config import read_run_config
from quantvla.runtime.control.clock import VirtualClock
from quantvla.runtime.control.guard import MotionGuard
from quantvla.runtime.control.limits import read_limits
from quantvla.runtime.control.strategy import Asynchronous
from quantvla.runtime.manifest import ActionSpec

EXAMPLES = Path(__file__).parents[2] / "examples" / "run"


def text_of(*shown: object) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    for one in shown:
        console.print(one)
    return console.export_text()


def test_the_view_before_while_and_after_a_run() -> None:
    robot = FakeRobot(VirtualClock())
    guard = MotionGuard(make_limits(upper=1.0), RATE_HZ)
    loop = make_loop(Asynchronous(RampPolicy(), 4), robot, guard=guard, delay_ticks=1)
    assert "none yet" in text_of(render(loop, "arm"))
    with live_view(loop, "arm", enabled=False):
        report = loop.run(ticks=30)
    shown = text_of(render(loop, "arm"))
    for expected in ("10 Hz, tick 29", "delay 1 ticks", "position", "+1.000 +1.000", "-> 1"):
        assert expected in shown
    ended = text_of(report_table(report, "arm"), report_lines(report))
    for expected in ("jitter, ms", "ended: time is up", "30 ticks at 10 Hz", "guard: position"):
        assert expected in ended


def test_the_example_run_files_are_valid() -> None:
    for path in sorted(EXAMPLES.glob("*.toml")):
        config = read_run_config(path)
        assert config.engine.is_absolute()
    names = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
    action = ActionSpec(horizon=50, execute=50, dim=6, names=tuple(f"{n}.pos" for n in names))
    limits = read_limits(EXAMPLES / "so101_limits.json", action)
    assert [joint.state for joint in limits.joints] == list(range(6))
