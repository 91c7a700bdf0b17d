"""Meta-World tasks as a fast, deterministic closed-loop simulator without torch.

The environments, camera pose, instructions and seeding are those of ``lerobot.envs.metaworld`` (a test compares
the two step by step); what differs is the cost: images are rendered only when ``observe`` is called, 128x128,
without shadows, reflections and multisampling (5 ms an image instead of 100 ms on a CPU).

    env = MetaWorldEnv("push-v3")
    observation = env.reset(seed=0)
    while not env.done:
        for action in policy.predict_action_chunk(observation):
            step = env.step(action)
            if env.done: break
        observation = env.observe()
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from quantvla.evaluate.perturbation import UNCHANGED, Perturbation, Perturber
from quantvla.runtime.closing import Closing

os.environ.setdefault(
    "MUJOCO_GL", "egl"
)  # mujoco reads it when it is imported: render without a display

STATE_KEY = "observation.state"
TASK_KEY = "task"
CAMERA_KEY_PREFIX = "observation.images."
CAMERAS = ("corner2", "behindGripper")
"""``corner2`` looks from the front right and gives depth; ``behindGripper`` moves with the hand and gives what is left
and right of it and above and below it. Together they fix goals and objects in three dimensions."""
CORNER2_POSITION = (0.75, 0.075, 0.7)
"""Camera position that lerobot uses for ``corner2``; the picture comes out upside down and is turned by 180 degrees."""
STATE_DIM = 4
ACTION_DIM = 4

Observation = dict[str, Any]
"""``observation.images.<camera>``: (height, width, 3) uint8 RGB; ``observation.state``: (4,) float32, hand position in
metres and gripper opening in [0, 1]; ``task``: the instruction sentence."""


@dataclass(frozen=True)
class Task:
    """One Meta-World task: its name, the instruction sentence given to the policy, and the step limit of an episode."""

    name: str
    instruction: str
    max_steps: int


TASKS: tuple[Task, ...] = (
    Task("reach-v3", "Reach a goal position", 120),
    Task("push-v3", "Push the puck to a goal", 160),
    Task("pick-place-v3", "Pick and place a puck to a goal", 160),
    Task("door-open-v3", "Open a door with a revolving joint", 200),
    Task("drawer-open-v3", "Open a drawer", 200),
    Task("drawer-close-v3", "Push and close a drawer", 160),
    Task("button-press-topdown-v3", "Press a button from the top", 160),
    Task("window-open-v3", "Push and open a window", 200),
    Task("window-close-v3", "Push and close a window", 200),
)


@dataclass(frozen=True)
class Step:
    """Result of one action: the state after it (4,) float32, the reward, whether the task is solved, whether time is up."""

    state: npt.NDArray[np.float32]
    reward: float
    success: bool
    truncated: bool


def find_task(name: str) -> Task:
    """Return the task called ``name``. Raises ValueError, with the nearest name, for one that is not in ``TASKS``."""
    for task in TASKS:
        if task.name == name:
            return task
    names = [task.name for task in TASKS]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"task: unknown Meta-World task, got {name!r}; did you mean {near!r}? known: {', '.join(names)}"
    )


class MetaWorldEnv(Closing):
    """One Meta-World task that can be reset to any seed. Not thread-safe; one instance per process and task."""

    def __init__(
        self,
        task: str,
        cameras: tuple[str, ...] = CAMERAS,
        image_size: int = 128,
        perturbation: Perturbation = UNCHANGED,
    ) -> None:
        """Build the simulator of ``task``, changed by ``perturbation``; the renderer is made at the first picture.

        Raises ValueError for an unknown task and ImportError, with the remedy, when Meta-World is not installed.
        """
        self.task = find_task(task)
        self.cameras = cameras
        self.image_size = image_size
        self._mujoco, metaworld = _import_simulator()
        benchmark = metaworld.MT1(task, seed=42)
        self._env: Any = benchmark.train_classes[task]()
        self._env.set_task(benchmark.train_tasks[0])
        self._env.model.cam_pos[self._env.model.camera("corner2").id] = CORNER2_POSITION
        self._env.model.vis.quality.offsamples = 0
        self._perturber = Perturber(self._env, task, perturbation)
        self._env.reset()
        self._env._freeze_rand_vec = False  # every reset draws a new goal ...
        self._env.seeded_rand_vec = True  # ... from the generator that `seed` sets
        self._renderer: Any = None
        self._raw: npt.NDArray[np.float64] = np.zeros(39)
        self._steps = 0
        self._success = False

    @property
    def done(self) -> bool:
        """Whether the episode is over: solved, or out of time."""
        return self._success or self._steps >= self.task.max_steps

    @property
    def state(self) -> npt.NDArray[np.float32]:
        """Hand position in metres and gripper opening: (4,) float32."""
        return self._raw[:STATE_DIM].astype(np.float32)

    @property
    def raw_observation(self) -> npt.NDArray[np.float64]:
        """The simulator's privileged observation (39,), which the scripted experts read and a policy must not."""
        return self._raw.copy()

    @property
    def goal(self) -> npt.NDArray[np.float64]:
        """The random vector that defines this episode (object and goal positions); its length depends on the task."""
        return np.asarray(self._env._last_rand_vec, dtype=np.float64).copy()

    def reset(self, seed: int, render: bool = True) -> Observation:
        """Start the episode that ``seed`` defines and return its first observation (without images if not ``render``).

        The same task and seed give the same episode in every process, whatever was simulated before.
        """
        self._perturber.start(seed)
        self._env.seed(seed)
        raw, _ = self._env.reset(seed=seed)
        # Goal markers are moved after the last forward pass of a reset: refresh what the renderer reads, not the physics.
        self._mujoco.mj_kinematics(self._env.model, self._env.data)
        self._mujoco.mj_camlight(self._env.model, self._env.data)
        self._raw, self._steps, self._success = raw, 0, False
        return self.observe() if render else self._observation()

    def observe(self) -> Observation:
        """Render every camera and return the observation a policy needs for its next chunk."""
        observation = self._observation()
        for camera in self.cameras:
            observation[CAMERA_KEY_PREFIX + camera] = self.render(camera)
        return observation

    def step(self, action: npt.NDArray[np.floating[Any]]) -> Step:
        """Apply one action (4,) in [-1, 1] (clipped): hand displacement in centimetres and gripper effort.

        Raises ValueError for another shape and RuntimeError once the episode is done.
        """
        if action.shape != (ACTION_DIM,):
            raise ValueError(
                f"action: expected shape ({ACTION_DIM},), got {action.shape}; pass one action of a chunk"
            )
        if self.done:
            raise RuntimeError(
                f"{self.task.name}: the episode is done, got another step; call reset(seed)"
            )
        disturbed = self._perturber.disturb(np.clip(action, -1.0, 1.0))
        raw, reward, _, _, info = self._env.step(np.clip(disturbed, -1.0, 1.0).astype(np.float32))
        self._raw = raw
        self._steps += 1
        self._success = bool(info["success"])
        truncated = not self._success and self._steps >= self.task.max_steps
        return Step(self.state, float(reward), self._success, truncated)

    def render(self, camera: str) -> npt.NDArray[np.uint8]:
        """Return the picture of ``camera``, right way up: (image_size, image_size, 3) uint8 RGB."""
        if self._renderer is None:
            self._renderer = self._mujoco.Renderer(
                self._env.model, self.image_size, self.image_size
            )
            for flag in (
                self._mujoco.mjtRndFlag.mjRND_SHADOW,
                self._mujoco.mjtRndFlag.mjRND_REFLECTION,
            ):
                self._renderer.scene.flags[flag] = 0
        self._renderer.update_scene(self._env.data, camera)
        image: npt.NDArray[np.uint8] = self._renderer.render()
        return np.ascontiguousarray(image[::-1, ::-1]) if camera == "corner2" else image.copy()

    def close(self) -> None:
        """Free the renderer. A later ``render`` makes a new one."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _observation(self) -> Observation:
        return {STATE_KEY: self.state, TASK_KEY: self.task.instruction}


def _import_simulator() -> tuple[ModuleType, ModuleType]:
    """Return (mujoco, metaworld), imported only when an environment is built."""
    try:
        import metaworld
        import mujoco
    except ImportError as error:
        raise ImportError(
            f"Meta-World: the simulator cannot be imported, got {error}; run `pip install quantvla[sim]`"
        ) from error
    return mujoco, metaworld
