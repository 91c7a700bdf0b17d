"""One Meta-World episode as a robot."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from quantvla.evaluate.environment import Environment, MetaWorld, Simulator, select_tasks
from quantvla.evaluate.episode import environment_seed
from quantvla.runtime.control.robot import FinishedError
from quantvla.runtime.preprocess import Observation

RELATIVE_ACTIONS = (True, True, True, False)
"""Hand displacement, then gripper effort: to hold is not to move the hand and to keep the grip."""


class MetaWorldRobot:
    """Runs one episode; ``act`` raises `FinishedError` after the step that solves it or uses up its time.

    ``observe`` renders the cameras in ``keys``. ``solved`` says how it went so far.
    """

    relative_actions = RELATIVE_ACTIONS
    slow_observe = True

    def __init__(
        self,
        task: str,
        *,
        seed: int = 0,
        episode: int = 0,
        keys: Collection[str],
        simulator: Simulator | None = None,
    ) -> None:
        """Open the simulator. Raises `QuantVLAError` for an unknown task or a missing simulator."""
        simulator = MetaWorld() if simulator is None else simulator
        simulator.check_installed()
        (name,) = select_tasks(simulator, [task])
        self.solved, self.steps = False, 0
        self._keys = frozenset(keys)
        self._environment: Environment = simulator.open(name)
        self._environment.reset(environment_seed(seed, episode))
        self._stopped = False

    def observe(self) -> Observation:
        """Render and return the present observation."""
        observation = self._environment.observe()
        return {key: value for key, value in observation.items() if key in self._keys}

    def act(self, action: NDArray[np.float32]) -> None:
        """Apply one action."""
        if self._stopped:
            return
        self.solved = self._environment.step(action).success
        self.steps += 1
        if self._environment.done:
            raise FinishedError(
                f"episode {'solved' if self.solved else 'not solved'} in {self.steps} steps"
            )

    def stop(self) -> None:
        """Ignore further actions: the simulation stands still without them."""
        self._stopped = True

    def close(self) -> None:
        """Free the simulator."""
        self._environment.close()
