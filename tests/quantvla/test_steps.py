"""Steps are reused while inputs, code and output are unchanged, and never otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quantvla import steps
from quantvla.steps import Step, StepRunner


@pytest.fixture
def step(tmp_path: Path) -> Step:
    return Step(
        name="copy",
        title="copy the thing",
        command="cp a b",
        output=tmp_path / "out" / "b",
        inputs=("a1",),
        work=(tmp_path / "out" / "partial",),
    )


def run(directory: Path, step: Step, content: str = "b") -> tuple[bool, int]:
    """Return whether the step was reused, and how often it ran."""
    calls = []

    def make() -> None:
        calls.append(1)
        step.output.parent.mkdir(parents=True, exist_ok=True)
        step.output.write_text(content)

    return StepRunner(directory, 1).run(step, make).reused, len(calls)


def test_an_unchanged_step_is_reused(tmp_path: Path, step: Step) -> None:
    assert run(tmp_path, step) == (False, 1)
    assert run(tmp_path, step) == (True, 0)


def test_a_changed_input_runs_it_again(tmp_path: Path, step: Step) -> None:
    run(tmp_path, step)
    assert run(tmp_path, replace(step, inputs=("a2",))) == (False, 1)


def test_a_touched_output_is_made_again(tmp_path: Path, step: Step) -> None:
    run(tmp_path, step)
    step.output.write_text("tampered")
    assert run(tmp_path, step) == (False, 1)
    step.output.unlink()
    assert run(tmp_path, step) == (False, 1)


def test_changed_code_runs_it_again(
    tmp_path: Path, step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, step)
    monkeypatch.setattr(steps, "code_sha256", lambda: "other")
    assert run(tmp_path, step) == (False, 1)


def test_a_failed_step_keeps_its_work_for_the_same_inputs(tmp_path: Path, step: Step) -> None:
    def fail() -> None:
        step.work[0].mkdir(parents=True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        StepRunner(tmp_path, 1).run(step, fail)
    assert run(tmp_path, step) == (False, 1)
    assert step.work[0].is_dir()
    assert run(tmp_path, replace(step, inputs=("a2",))) == (False, 1)
    assert not step.work[0].exists()


def test_work_can_depend_on_fewer_inputs(tmp_path: Path, step: Step) -> None:
    wide = replace(step, inputs=("a1", "10 episodes"), work_inputs=("a1",))
    run(tmp_path, wide)
    step.work[0].mkdir()
    assert run(tmp_path, replace(wide, inputs=("a1", "20 episodes"))) == (False, 1)
    assert step.work[0].is_dir()


def test_an_unreadable_record_runs_every_step(tmp_path: Path, step: Step) -> None:
    run(tmp_path, step)
    (tmp_path / "steps.json").write_text("{")
    assert run(tmp_path, step) == (False, 1)


def test_commands_are_shown(tmp_path: Path, step: Step, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, step)
    run(tmp_path, step)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "[1/1] copy the thing" in shown.err
    assert "$ cp a b" in shown.err
    assert "done in" in shown.err and "reused" in shown.err
