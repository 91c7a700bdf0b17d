"""Harder tasks: what is changed, the same for every arm, and never mixed with the plain ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_simulator import FakeSimulator, arm, load

from quantvla.evaluate.closed_loop import EvaluationPlan, evaluate
from quantvla.evaluate.combine import join_journals
from quantvla.evaluate.metaworld import CAMERA_KEY_PREFIX, MetaWorldEnv
from quantvla.evaluate.perturbation import UNCHANGED, Perturbation, parse_perturbation
from quantvla.evaluate.results import pair_results
from quantvla.runtime.errors import QuantVLAError

CORNER = CAMERA_KEY_PREFIX + "corner2"
PLAN = EvaluationPlan(tasks=("all",), episodes=3)


def run(names: list[str], journal: Path, perturbation: Perturbation = UNCHANGED) -> object:
    simulator = FakeSimulator(perturbation=perturbation)
    arms = [arm(name) for name in names]
    return evaluate(
        arms, PLAN, processes=1, journal=journal, simulator=simulator, load=load, progress=False
    )


def test_arguments() -> None:
    found = parse_perturbation(["camera=0.05", "goals=0.2"])
    assert found == Perturbation(camera=0.05, goals=0.2)
    assert found.as_dict() == {"camera": 0.05, "goals": 0.2}
    assert parse_perturbation([]) == Perturbation() and not Perturbation().as_dict()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("camra=1", r"--perturb: unknown perturbation, got 'camra'; did you mean 'camera'\?"),
        (
            "camera=2",
            r"--perturb camera: expected a number from 0 to 0.5 \(metres\), got '2'; write",
        ),
        ("light=-1", "--perturb light: expected a number from 0 to 4"),
        ("goals", r"--perturb goals: expected a number .*, got ''"),
        ("light=bright", "got 'bright'"),
    ],
)
def test_bad_arguments(argument: str, message: str) -> None:
    with pytest.raises(QuantVLAError, match=message):
        parse_perturbation([argument])


def test_given_twice() -> None:
    with pytest.raises(QuantVLAError, match="--perturb: given twice, got 'light'; give one value"):
        parse_perturbation(["light=1", "light=2"])


def test_journals_of_different_perturbations_are_not_mixed(tmp_path: Path) -> None:
    journal = tmp_path / "episodes.jsonl"
    found = run(["good"], journal, Perturbation(camera=0.1))
    assert found.perturbation == {"camera": 0.1}  # type: ignore[attr-defined]
    message = r"another evaluation: perturbation expected {'camera': 0.2}, got {'camera': 0.1}"
    with pytest.raises(QuantVLAError, match=message):
        run(["good"], journal, Perturbation(camera=0.2))
    with pytest.raises(QuantVLAError, match=r"perturbation expected {}, got {'camera': 0.1}"):
        run(["good"], journal)


def test_arms_evaluated_apart_are_the_pairs_they_are_together(tmp_path: Path) -> None:
    together = run(["good", "bad"], tmp_path / "both")
    run(["good"], tmp_path / "good")
    run(["bad"], tmp_path / "bad")
    records = join_journals([tmp_path / "good", tmp_path / "bad"])
    assert pair_results(records, ["good", "bad"]) == together.pairs  # type: ignore[attr-defined]


def test_only_common_episodes_are_joined_and_only_of_one_bed(tmp_path: Path) -> None:
    for name in ("good", "bad"):
        run([name], tmp_path / name)
    lines = (tmp_path / "bad").read_bytes().splitlines(keepends=True)
    (tmp_path / "bad").write_bytes(b"".join(lines[:-4]))
    assert len(join_journals([tmp_path / "good", tmp_path / "bad"])) == 9 - 4
    run(["other"], tmp_path / "other", Perturbation(light=1))
    with pytest.raises(QuantVLAError, match=r"is of another evaluation than .*: perturbation"):
        join_journals([tmp_path / "good", tmp_path / "other"])
    with pytest.raises(QuantVLAError, match=r"has an arm of an earlier journal, got good; give"):
        join_journals([tmp_path / "good", tmp_path / "good"])
    with pytest.raises(QuantVLAError, match="no such journal; run the evaluation first"):
        join_journals([tmp_path / "absent"])


# ------------------------------------------------------------------ the real simulator
def episode(perturbation: Perturbation, seed: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the first picture, the goal, and the state after five steps."""
    pytest.importorskip("metaworld")
    with MetaWorldEnv("push-v3", perturbation=perturbation) as env:
        picture = env.reset(seed)[CORNER]
        for _ in range(5):
            env.step(np.zeros(4, np.float32))
        return picture, env.goal, env.state


@pytest.mark.slow
def test_each_perturbation_changes_its_own_thing() -> None:
    picture, goal, state = episode(Perturbation())
    moved = episode(Perturbation(camera=0.05))
    lit = episode(Perturbation(light=0.5))
    wider = episode(Perturbation(goals=0.5))
    shaken = episode(Perturbation(actions=0.5))
    for changed in (moved, lit):
        assert (changed[0] != picture).mean() > 0.2
        assert np.array_equal(changed[1], goal) and np.array_equal(changed[2], state)
    assert not np.array_equal(wider[1], goal)
    assert np.array_equal(shaken[0], picture) and np.array_equal(shaken[1], goal)
    assert np.abs(shaken[2] - state).max() > 1e-3


@pytest.mark.slow
def test_an_episode_depends_on_its_seed_alone() -> None:
    pytest.importorskip("metaworld")
    every = Perturbation(camera=0.05, light=0.5, goals=0.2, actions=0.3)
    expected = episode(every)
    with MetaWorldEnv("push-v3", perturbation=every) as env:
        env.reset(9)
        env.step(np.ones(4, np.float32))
        other = env.reset(9)[CORNER]
        again = env.reset(4)[CORNER]
        assert np.array_equal(again, expected[0]) and not np.array_equal(again, other)
        for _ in range(5):
            env.step(np.zeros(4, np.float32))
        assert np.array_equal(env.state, expected[2])
