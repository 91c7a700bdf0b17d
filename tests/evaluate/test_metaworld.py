"""The Meta-World wrapper: deterministic, the same simulation as lerobot's, and evaluated on goals that nobody trained on."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from quantvla.evaluate.metaworld import (
    CAMERA_KEY_PREFIX,
    CAMERAS,
    STATE_KEY,
    TASK_KEY,
    TASKS,
    MetaWorldEnv,
    find_task,
)

pytest.importorskip("metaworld")

EXAMPLE = Path(__file__).parents[2] / "examples" / "metaworld"
EVALUATION_SEEDS = range(50)


def actions(count: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Random actions (count, 4) in [-1, 1]."""
    return np.random.default_rng(seed).uniform(-1, 1, (count, 4)).astype(np.float32)


def fingerprint(env: MetaWorldEnv, seed: int, steps: int = 12) -> str:
    """Hash of every state, reward and of the first and last pictures of an episode of random actions."""
    digest = hashlib.sha256()
    first = env.reset(seed)
    for action in actions(steps):
        step = env.step(action)
        digest.update(step.state.tobytes() + np.float64(step.reward).tobytes())
    for observation in (first, env.observe()):
        for camera in CAMERAS:
            digest.update(observation[CAMERA_KEY_PREFIX + camera].tobytes())
    return digest.hexdigest()


def test_observation_has_the_documented_keys_shapes_and_types() -> None:
    with MetaWorldEnv("push-v3") as env:
        observation = env.reset(seed=3)
        for camera in CAMERAS:
            image = observation[CAMERA_KEY_PREFIX + camera]
            assert image.shape == (128, 128, 3) and image.dtype == np.uint8 and image.std() > 10
        assert observation[STATE_KEY].shape == (4,) and observation[STATE_KEY].dtype == np.float32
        assert observation[TASK_KEY] == "Push the puck to a goal"


def test_same_seed_is_the_same_episode_whatever_ran_before() -> None:
    with MetaWorldEnv("pick-place-v3") as env:
        reference = fingerprint(env, seed=5)
        assert fingerprint(env, seed=6) != reference
        assert fingerprint(env, seed=5) == reference


def test_same_seed_is_the_same_episode_in_another_process() -> None:
    code = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(EXAMPLE.parents[1])]!r}\n"
        "from test_metaworld import MetaWorldEnv, fingerprint\n"
        "print(fingerprint(MetaWorldEnv('door-open-v3'), seed=7))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    with MetaWorldEnv("door-open-v3") as env:
        assert fingerprint(env, seed=7) == other.stdout.split()[-1]


@pytest.mark.parametrize("task", ["push-v3", "drawer-close-v3", "window-open-v3"])
def test_steps_equal_those_of_lerobots_environment(task: str) -> None:
    lerobot_metaworld = pytest.importorskip("lerobot.envs.metaworld")
    theirs = lerobot_metaworld.MetaworldEnv(
        task, obs_type="pixels_agent_pos", observation_width=64, observation_height=64
    )
    theirs.reset(seed=11)
    with MetaWorldEnv(task) as ours:
        ours.reset(seed=11, render=False)
        for action in actions(20):
            observation, reward, _, _, info = theirs.step(action)
            step = ours.step(action)
            np.testing.assert_array_equal(step.state, observation["agent_pos"].astype(np.float32))
            assert (step.reward, step.success) == (reward, info["is_success"])
    theirs.close()


def test_instructions_are_lerobots() -> None:
    lerobot_metaworld = pytest.importorskip("lerobot.envs.metaworld")
    for task in TASKS:
        assert task.instruction == lerobot_metaworld.TASK_DESCRIPTIONS[task.name]


@pytest.mark.parametrize("task", [task.name for task in TASKS])
def test_evaluation_goals_are_disjoint_from_demonstration_goals(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from make_dataset import EPISODES, demonstration_seed

    attempts = EPISODES[task] + 50  # more than were recorded: held-out episodes, failures
    with MetaWorldEnv(task) as env:
        evaluated = drawn_goals(env, EVALUATION_SEEDS)
        demonstrated = drawn_goals(
            env, [demonstration_seed(task, index) for index in range(attempts)]
        )
    assert len(evaluated) == len(EVALUATION_SEEDS)
    assert not evaluated & demonstrated


def drawn_goals(env: MetaWorldEnv, seeds: range | list[int]) -> set[tuple[float, ...]]:
    """The random vectors that define the episodes of ``seeds``."""
    goals = set()
    for seed in seeds:
        env.reset(seed, render=False)
        goals.add(tuple(env.goal))
    return goals


def test_episode_ends_at_the_step_limit_and_then_refuses_actions() -> None:
    with MetaWorldEnv("reach-v3") as env:
        env.reset(seed=1, render=False)
        still = np.array([0.0, 0.0, 1.0, 0.0])
        while not env.done:
            step = env.step(still)
        assert step.truncated and not step.success
        with pytest.raises(
            RuntimeError, match=r"reach-v3: the episode is done, got another step; call reset"
        ):
            env.step(still)


def test_wrong_action_shape_says_what_to_pass() -> None:
    with MetaWorldEnv("reach-v3") as env:
        env.reset(seed=1, render=False)
        with pytest.raises(
            ValueError, match=r"action: expected shape \(4,\), got \(8, 4\); pass one action"
        ):
            env.step(np.zeros((8, 4)))


def test_unknown_task_offers_the_nearest_name() -> None:
    with pytest.raises(
        ValueError,
        match="unknown Meta-World task, got 'drawer-opn-v3'; did you mean 'drawer-open-v3'",
    ):
        find_task("drawer-opn-v3")


def test_missing_simulator_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(ImportError, match=r"run `pip install quantvla\[sim\]`"):
        MetaWorldEnv("reach-v3")
