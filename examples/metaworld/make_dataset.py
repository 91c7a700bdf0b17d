"""Record demonstrations of Meta-World's scripted experts.

    python examples/metaworld/make_dataset.py frames      # experts + pictures -> build/metaworld/frames (raw arrays)
    python examples/metaworld/make_dataset.py lerobot     # episodes of those  -> build/metaworld/dataset (LeRobotDataset v3)

The executed action is the expert's plus Gaussian noise on the three displacements, whose scale is drawn once per episode;
the recorded action is the expert's, clipped to [-1, 1], so the data show how to recover. Every step has pictures of both
cameras. The last ``HELD_OUT`` episodes of each task are never trained on. ``frames`` skips tasks that are complete.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from frames import HELD_OUT, Shard, load_shard
from robot import IMAGE_SIZE

from quantvla.evaluate.metaworld import (
    CAMERA_KEY_PREFIX,
    CAMERAS,
    STATE_KEY,
    TASK_KEY,
    TASKS,
    MetaWorldEnv,
    find_task,
)

BUILD = Path("build/metaworld")
EPISODES = {
    "reach-v3": 80,
    "push-v3": 220,
    "pick-place-v3": 260,
    "door-open-v3": 100,
    "drawer-open-v3": 90,
    "drawer-close-v3": 60,
    "button-press-topdown-v3": 120,
    "window-open-v3": 90,
    "window-close-v3": 90,
}
"""Training episodes per task; more where the hand must meet a small object."""
FIRST_SEED = 100_000
"""Demonstration seeds start here, 10 000 apart for each task; evaluation seeds lie below."""
NOISE_SCALES = (0.0, 0.15, 0.3, 0.5)
FPS = 80


@dataclass(frozen=True)
class Episode:
    """One successful demonstration of T steps.

    images: (T, cameras, 128, 128, 3) uint8; states: (T, 4) float32; actions: (T, 4) float32, the expert's, clipped;
    raw: (T, 39) float64, the privileged observation; goal: the random vector that the seed drew; noise: scale of the
    execution noise.
    """

    images: npt.NDArray[np.uint8]
    states: npt.NDArray[np.float32]
    actions: npt.NDArray[np.float32]
    raw: npt.NDArray[np.float64]
    goal: npt.NDArray[np.float64]
    seed: int
    noise: float


def demonstration_seed(task: str, index: int) -> int:
    """Return the seed of the ``index``-th attempt at a demonstration of ``task``."""
    return FIRST_SEED + 10_000 * [t.name for t in TASKS].index(task) + index


def record_episode(env: MetaWorldEnv, seed: int) -> Episode | None:
    """Run the scripted expert on ``seed`` and return the episode, or None if it did not succeed in time."""
    from metaworld.policies import ENV_POLICY_MAP

    expert = ENV_POLICY_MAP[env.task.name]()
    rng = np.random.default_rng(seed)
    noise = NOISE_SCALES[rng.integers(len(NOISE_SCALES))]
    env.reset(seed, render=False)
    images, states, actions, raw = [], [], [], []
    success = False
    while not env.done:
        action = np.clip(expert.get_action(env.raw_observation), -1.0, 1.0).astype(np.float32)
        images.append(np.stack([env.render(camera) for camera in env.cameras]))
        states.append(env.state)
        actions.append(action)
        raw.append(env.raw_observation)
        executed = action.copy()
        executed[:3] += rng.normal(scale=noise, size=3) if noise else 0.0
        success = env.step(executed).success
    if not success:
        return None
    return Episode(
        np.stack(images), np.stack(states), np.stack(actions), np.stack(raw), env.goal, seed, noise
    )


def record_task(task: str, count: int, out: Path) -> None:
    """Write ``count`` + HELD_OUT successful episodes of ``task`` to ``out/<task>.raw`` (pictures) and ``.npz`` (rest).

    The .npz is renamed into place last: a shard with one is complete.
    """
    table = out / f"{task}.npz"
    if table.exists():
        return
    start = time.monotonic()
    columns: dict[str, list[npt.NDArray[Any]]] = {"states": [], "actions": [], "raw": []}
    rows: dict[str, list[Any]] = {"lengths": [], "goals": [], "seeds": [], "noise": []}
    attempts = 0
    with MetaWorldEnv(task, image_size=IMAGE_SIZE) as env, (out / f"{task}.raw").open("wb") as file:
        while len(rows["seeds"]) < count + HELD_OUT:
            episode = record_episode(env, demonstration_seed(task, attempts))
            attempts += 1
            if episode is None:
                continue
            file.write(episode.images.tobytes())
            columns["states"].append(episode.states)
            columns["actions"].append(episode.actions)
            columns["raw"].append(episode.raw)
            summary = (len(episode.states), episode.goal, episode.seed, episode.noise)
            for name, item in zip(rows, summary, strict=True):
                rows[name].append(item)
    partial = out / f"{task}.partial.npz"
    table_columns: dict[str, Any] = {name: np.concatenate(parts) for name, parts in columns.items()}
    table_columns |= {name: np.array(items) for name, items in rows.items()}
    np.savez(partial, **table_columns)
    partial.replace(table)
    episodes, seconds = len(rows["seeds"]), time.monotonic() - start
    print(
        f"{task}: {episodes} episodes, {attempts - episodes} failures dropped, {seconds:.0f} s",
        flush=True,
    )


def record_all(out: Path, tasks: Sequence[str], processes: int) -> None:
    """Record ``tasks``, the longest first."""
    out.mkdir(parents=True, exist_ok=True)
    jobs = [(task, EPISODES[task], out) for task in tasks]
    jobs.sort(key=lambda job: -job[1])
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.starmap(record_task, jobs, chunksize=1)


def export_lerobot(frames: Path, out: Path, per_task: int) -> None:
    """Write the last ``per_task`` episodes of each task as a LeRobotDataset v3 with PNG pictures of every step.

    ``out/meta/episodes_by_task.json`` says which episode belongs to which task, whether it is held out, and its seed.
    """
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    axes = ["x", "y", "z", "gripper"]
    image = {
        "dtype": "image",
        "shape": (IMAGE_SIZE, IMAGE_SIZE, 3),
        "names": ["height", "width", "channels"],
    }
    features = {
        **{CAMERA_KEY_PREFIX + camera: image for camera in CAMERAS},
        STATE_KEY: {"dtype": "float32", "shape": (4,), "names": axes},
        "action": {"dtype": "float32", "shape": (4,), "names": axes},
    }
    dataset = LeRobotDataset.create(
        "quantvla/metaworld", FPS, features, root=partial, robot_type="sawyer", use_videos=False
    )
    index: list[dict[str, object]] = []
    for task in TASKS:
        shard = load_shard(task.name, frames)
        count = len(shard.lengths)
        for episode in range(max(0, count - per_task), count):
            index.append(
                {
                    "episode_index": len(index),
                    "task": task.name,
                    "instruction": task.instruction,
                    "held_out": episode >= count - HELD_OUT,
                    "seed": int(shard.seeds[episode]),
                    "steps": int(shard.lengths[episode]),
                }
            )
            add_episode(dataset, shard, episode)
    dataset.finalize()
    (partial / "meta" / "episodes_by_task.json").write_text(json.dumps(index, indent=1) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    partial.replace(out)
    print(f"{out}: {len(index)} episodes")


def add_episode(dataset: object, shard: Shard, episode: int) -> None:
    """Append one recorded episode to a LeRobotDataset."""
    end = int(shard.lengths[: episode + 1].sum())
    for step in range(end - int(shard.lengths[episode]), end):
        images = {
            CAMERA_KEY_PREFIX + camera: shard.images[step, index]
            for index, camera in enumerate(CAMERAS)
        }
        frame = {**images, STATE_KEY: shard.states[step], "action": shard.actions[step]}
        dataset.add_frame({**frame, TASK_KEY: find_task(shard.task).instruction})  # type: ignore[attr-defined]
    dataset.save_episode()  # type: ignore[attr-defined]


def main() -> None:
    """Parse the command line and run one of the two commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["frames", "lerobot"])
    parser.add_argument("--build", type=Path, default=BUILD)
    parser.add_argument(
        "--processes", type=int, default=2, help="frames: simulators at the same time"
    )
    names = [task.name for task in TASKS]
    parser.add_argument("--tasks", nargs="+", default=names, choices=names, help="frames: which")
    parser.add_argument(
        "--per-task", type=int, default=24, help="lerobot: the last episodes of each task to write"
    )
    options = parser.parse_args()
    if options.command == "frames":
        record_all(options.build / "frames", options.tasks, options.processes)
    else:
        export_lerobot(options.build / "frames", options.build / "dataset", options.per_task)


if __name__ == "__main__":
    main()
