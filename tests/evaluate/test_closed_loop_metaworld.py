"""The closed loop in the real simulator, with a scripted policy instead of a trained one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from quantvla.evaluate import metaworld
from quantvla.evaluate.arms import Arm, Contract
from quantvla.evaluate.closed_loop import EvaluationPlan, evaluate
from quantvla.evaluate.environment import MetaWorld
from quantvla.evaluate.episode import DEMONSTRATION_SEEDS_FROM, environment_seed
from quantvla.evaluate.rollouts import record_rollouts

pytest.importorskip("metaworld")
pytestmark = pytest.mark.slow

CAMERAS = MetaWorld().cameras
CONTRACT = Contract(
    cameras=CAMERAS,
    state_key=metaworld.STATE_KEY,
    state_dim=4,
    task_key="task",
    action_dim=4,
    horizon=16,
    execute=8,
    noise_shape=(1, 16, 32),
)
TASK = "drawer-close-v3"


class PushForward:
    """Lowers the hand in front of the drawer and pushes; swerves with the flow noise, as ``scale`` says."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def predict_action_chunk(
        self,
        obs: Mapping[str, Any],
        /,
        *,
        noise: npt.NDArray[np.float32] | None = None,
        seed: int | None = None,
    ) -> npt.NDArray[np.float32]:
        assert noise is not None
        for camera in CAMERAS:
            assert obs[camera].shape == (128, 128, 3) and obs[camera].std() > 5
        lowered = obs[metaworld.STATE_KEY][2] < 0.1
        move = np.array([0, 1, 0, -1] if lowered else [0, -0.3, -1, -1], np.float32)
        return move + self.scale * noise[0, :, :4]


def load(arm: Arm) -> PushForward:
    return PushForward(float(arm.name))


def arm(scale: str) -> Arm:
    return Arm(name=scale, path="", kind="engine", sha256=scale, contract=CONTRACT)


def test_processes_do_not_change_the_episodes() -> None:
    plan = EvaluationPlan(tasks=(TASK,), episodes=4)
    arms = [arm("0.1"), arm("3")]
    one = evaluate(arms, plan, processes=1, load=load, progress=False)
    two = evaluate(arms, plan, processes=2, load=load, progress=False)
    assert one == two
    assert one.arms["0.1"].successes >= 1
    assert "metaworld" in one.versions


def test_the_film_shows_the_evaluated_episode() -> None:
    plan = EvaluationPlan(tasks=(TASK,), episodes=1)
    result = evaluate([arm("0.1")], plan, processes=1, load=load, progress=False)
    (rollout,) = record_rollouts([arm("0.1")], [TASK], image_size=64, load=load)
    assert rollout.success == bool(result.arms["0.1"].successes)
    assert rollout.frames[0].shape == (64, 64, 3)
    assert len(rollout.frames) == 1 + -(-rollout.steps // 5)


def test_evaluated_goals_are_not_those_of_the_demonstrations() -> None:
    """Drawn goals are compared, not seed numbers."""

    def goals(first: int) -> set[tuple[float, ...]]:
        found = set()
        with metaworld.MetaWorldEnv(TASK) as environment:
            for seed in range(first, first + 50):
                environment.reset(seed, render=False)
                found.add(tuple(environment.goal.round(6)))
        return found

    evaluated = goals(environment_seed(0, 0))
    assert len(evaluated) == 50
    assert not evaluated & goals(DEMONSTRATION_SEEDS_FROM)
