"""The closed loop with a fake simulator: pairing, determinism, resuming, failures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from fake_simulator import CONTRACT, FakeEnvironment, FakeSimulator, NoisyPolicy, arm, load

from quantvla.evaluate import closed_loop, workers
from quantvla.evaluate.arms import Arm
from quantvla.evaluate.closed_loop import EvaluationPlan, evaluate
from quantvla.evaluate.episode import (
    DEMONSTRATION_SEEDS_FROM,
    EPISODES_PER_SEED,
    SEEDS,
    chunk_noise,
    environment_seed,
    run_episode,
)
from quantvla.evaluate.journal import Header, Journal
from quantvla.evaluate.results import Evaluation
from quantvla.runtime.errors import QuantVLAError

PLAN = EvaluationPlan(tasks=("all",), episodes=6)


def run(
    arms: list[Arm], plan: EvaluationPlan = PLAN, processes: int = 2, journal: Path | None = None
) -> Evaluation:
    return evaluate(
        arms,
        plan,
        processes=processes,
        journal=journal,
        simulator=FakeSimulator(),
        load=load,
        progress=False,
    )


def test_same_result_with_any_number_of_processes() -> None:
    arms = [arm("good"), arm("bad")]
    one, three = run(arms, processes=1), run(arms, processes=3)
    assert one == three
    assert one.arms["good"].rate > one.arms["bad"].rate
    assert one.arms["good"].episodes == 18
    assert list(one.arms["good"].tasks) == ["go", "come", "fetch"]


def test_another_seed_is_another_result() -> None:
    plan = EvaluationPlan(tasks=("all",), episodes=6, seed=1)
    assert run([arm("bad")]).arms != run([arm("bad")], plan).arms


def test_all_arms_see_the_same_noise(tmp_path: Path) -> None:
    logs = [tmp_path / "a", tmp_path / "b"]
    run([arm("bad", str(logs[0])), arm("worse", str(logs[1]))], processes=1)
    seen = [set(log.read_text().splitlines()) for log in logs]
    first_chunks = {
        f"{task} {chunk_noise(0, task, episode, 0, CONTRACT.noise_shape).ravel()[:3].tolist()}"
        for task in FakeSimulator().tasks
        for episode in range(6)
    }
    assert len(first_chunks) == 18
    assert first_chunks <= seen[0] and first_chunks <= seen[1]


def test_a_subset_of_tasks_gives_the_same_episodes() -> None:
    whole = run([arm("bad")])
    part = run([arm("bad")], EvaluationPlan(tasks=("fetch",), episodes=6))
    assert part.arms["bad"].tasks["fetch"] == whole.arms["bad"].tasks["fetch"]


def test_pairs_count_every_episode() -> None:
    result = run([arm("good"), arm("bad"), arm("other")])
    assert [(pair.a, pair.b) for pair in result.pairs] == [
        ("good", "bad"),
        ("good", "other"),
        ("bad", "other"),
    ]
    pair = result.pairs[0]
    assert pair.both + pair.only_a + pair.only_b + pair.neither == 18
    assert pair.both + pair.only_a == result.arms["good"].successes
    assert pair.difference == pytest.approx(result.arms["bad"].rate - result.arms["good"].rate)
    assert result.shared_noise


def test_pictures_are_rendered_only_for_a_chunk() -> None:
    environment = FakeEnvironment("go")
    trajectory = run_episode(NoisyPolicy(0.0), CONTRACT, environment, "go", 0, seed=0)
    assert trajectory.success
    assert environment.renders == -(-len(trajectory.actions) // CONTRACT.execute)


def test_execute_overrides_the_policy() -> None:
    environment = FakeEnvironment("go")
    run_episode(NoisyPolicy(0.0), CONTRACT, environment, "go", 0, seed=0, execute=4)
    assert environment.renders == -(-environment.steps // 4)


class _Cut(NoisyPolicy):
    """Hands out ``rows`` of its chunk, repeating it where that is more."""

    def __init__(self, rows: int) -> None:
        super().__init__(0.5)
        self.rows = rows

    def predict_action_chunk(self, *args: Any, **given: Any) -> Any:
        return np.tile(super().predict_action_chunk(*args, **given), (2, 1))[: self.rows]


def test_a_policy_may_hand_out_only_what_is_executed() -> None:
    whole, cut = (
        run_episode(_Cut(rows), CONTRACT, FakeEnvironment("go"), "go", 0, seed=0)
        for rows in (CONTRACT.horizon, CONTRACT.execute)
    )
    assert np.array_equal(whole.actions, cut.actions)


@pytest.mark.parametrize(("rows", "execute"), [(1, None), (3, None), (5, None), (2, 3)])
def test_a_chunk_of_another_length_is_refused(rows: int, execute: int | None) -> None:
    with pytest.raises(QuantVLAError, match=r"expected 2 actions a row and .*4 rows, got"):
        run_episode(_Cut(rows), CONTRACT, FakeEnvironment("go"), "go", 0, seed=0, execute=execute)


def test_a_killed_evaluation_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = tmp_path / "episodes.jsonl"
    arms = [arm("good"), arm("bad")]
    whole = run(arms, journal=journal)
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:8]) + lines[8][:25])
    ran: list[workers.Item] = []
    original = closed_loop.run_items

    def spy(job: workers.Job, items: list[workers.Item], processes: int) -> object:
        ran.extend(items)
        return original(job, items, processes)

    monkeypatch.setattr(closed_loop, "run_items", spy)
    assert run(arms, journal=journal) == whole
    assert len(ran) == 18 - 7
    assert sorted(journal.read_bytes().splitlines()) == sorted(line.rstrip() for line in lines)
    ran.clear()
    assert run(arms, journal=journal) == whole
    assert not ran


def test_a_journal_grows_with_more_episodes(tmp_path: Path) -> None:
    journal = tmp_path / "episodes.jsonl"
    run([arm("bad")], EvaluationPlan(tasks=("go",), episodes=2), journal=journal)
    assert run([arm("bad")], journal=journal) == run([arm("bad")])


def test_a_journal_of_another_evaluation_is_refused(tmp_path: Path) -> None:
    journal = tmp_path / "episodes.jsonl"
    run([arm("bad")], journal=journal)
    other = EvaluationPlan(tasks=("all",), episodes=6, seed=3)
    with pytest.raises(QuantVLAError, match=r"another evaluation: seed expected 3, got 0"):
        run([arm("bad")], other, journal=journal)
    with pytest.raises(QuantVLAError, match=r"another evaluation: arms expected"):
        run([arm("good")], journal=journal)


def header() -> Header:
    return Header(quantvla="1", simulator="fake", seed=0, execute=None, arms={"a": "hash"})


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    path.write_bytes(msgspec.json.encode(header()) + b"\n{broken\n{}\n")
    with pytest.raises(QuantVLAError, match=r"episodes.jsonl:2: damaged line .*; delete the line"):
        Journal(path, header())


def test_not_a_journal(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    path.write_text("hello\n")
    with pytest.raises(QuantVLAError, match="is not a journal"):
        Journal(path, header())


def test_a_header_cut_off_starts_again(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    path.write_text('{"journal":1,"quant')
    with Journal(path, header()) as journal:
        assert journal.records == ()
    assert path.read_bytes() == msgspec.json.encode(header()) + b"\n"


def test_a_chunk_that_is_not_finite_names_arm_and_episode() -> None:
    message = r"go episode 0, arm broken: action chunk: not finite, got nan or inf; verify"
    with pytest.raises(QuantVLAError, match=message):
        run([arm("good"), arm("broken")], processes=1)


def test_an_exception_in_a_worker_names_arm_and_episode(capfd: pytest.CaptureFixture[str]) -> None:
    message = r"fetch episode \d, arm raising: failed, got ZeroDivisionError: no engine"
    with pytest.raises(QuantVLAError, match=message):
        run([arm("raising")])
    assert "Traceback" in capfd.readouterr().err


def test_a_worker_that_dies_names_the_episode_and_keeps_the_rest(tmp_path: Path) -> None:
    journal = tmp_path / "episodes.jsonl"
    message = r"fetch episode 0: the worker process died, got exit code 7; .*resumes"
    with pytest.raises(QuantVLAError, match=message):
        run([arm("dying")], processes=1, journal=journal)
    assert len(journal.read_bytes().splitlines()) == 1 + 12


def test_ctrl_c_stops_the_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    journal = tmp_path / "episodes.jsonl"
    appended: list[object] = []

    def interrupt(self: Journal, record: object) -> None:
        appended.append(record)
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run([arm("good")], journal=journal)
    assert len(appended) == 1
    import multiprocessing

    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("arms", "plan", "message"),
    [
        ([], PLAN, "arms: none given"),
        ([arm("a"), arm("a")], PLAN, "arms: name used twice, got 'a'"),
        ([arm("a")], EvaluationPlan(("fetsh",), 1), r"unknown fake task, got 'fetsh'; .*'fetch'"),
        ([arm("a")], EvaluationPlan(("all",), 0), "episodes: expected at least 1, got 0"),
        ([arm("a")], EvaluationPlan(("all",), 1001), "a seed has 1000 episodes per task, got 1001"),
        ([arm("a")], EvaluationPlan(("all",), 1, seed=100), "seed: expected 0 to 99, got 100"),
        ([arm("a")], EvaluationPlan(("all",), 1, execute=5), "expected 1 to 4 actions .*, got 5"),
    ],
)
def test_bad_plans(arms: list[Arm], plan: EvaluationPlan, message: str) -> None:
    with pytest.raises(QuantVLAError, match=message):
        run(arms, plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cameras": ("observation.images.top",)}, r"reads cameras .*got observation.images.top"),
        ({"state_dim": 7}, "expected state observation.state of length 2, got .*length 7"),
        ({"action_dim": 6}, "expected actions of length 2, got 6; evaluate a policy"),
    ],
)
def test_a_policy_of_another_robot(change: dict[str, object], message: str) -> None:
    contract = msgspec.structs.replace(CONTRACT, **change)
    with pytest.raises(QuantVLAError, match=message):
        run([arm("a", contract=contract)])


def test_different_noise_shapes_are_reported() -> None:
    contract = msgspec.structs.replace(CONTRACT, noise_shape=(1, 8, 3))
    one, other = arm("good"), arm("x", contract=contract)
    result = closed_loop._summary([one, other], PLAN, FakeSimulator(), [])
    assert not result.shared_noise


def test_seeds_stay_clear_of_the_demonstrations() -> None:
    assert environment_seed(0, 0) == 0
    assert environment_seed(SEEDS - 1, EPISODES_PER_SEED - 1) < DEMONSTRATION_SEEDS_FROM
    assert environment_seed(3, 7) == 3007


def test_noise_is_standard_normal_and_differs_by_chunk() -> None:
    draws = [chunk_noise(0, "go", 0, chunk, (1, 64, 32)) for chunk in range(4)]
    assert np.std(draws[0]) == pytest.approx(1, abs=0.1)
    assert not np.array_equal(draws[0], draws[1])
    assert draws[0].dtype == np.float32
