"""Recorded demonstrations as arrays: loading, and drawing augmented training batches from the memory-mapped pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from robot import IMAGE_SIZE

from quantvla.evaluate.metaworld import CAMERAS

HELD_OUT = 4
"""The last episodes of each task are never trained on."""


@dataclass(frozen=True)
class Shard:
    """The demonstrations of one task, steps concatenated.

    images: (steps, cameras, 128, 128, 3) uint8, memory-mapped; states, actions: (steps, 4) float32; raw: (steps, 39)
    float64, the privileged observation; lengths: (episodes,) steps of each episode; goals: (episodes, n) drawn random
    vectors; seeds: (episodes,).
    """

    task: str
    images: npt.NDArray[np.uint8]
    states: npt.NDArray[np.float32]
    actions: npt.NDArray[np.float32]
    raw: npt.NDArray[np.float64]
    lengths: npt.NDArray[np.int64]
    goals: npt.NDArray[np.float64]
    seeds: npt.NDArray[np.int64]

    @property
    def training_steps(self) -> int:
        """Number of steps before the held-out episodes."""
        return int(self.lengths[:-HELD_OUT].sum())

    def episode_ends(self) -> npt.NDArray[np.int64]:
        """Return, for every step, the index one past its episode's last step: (steps,)."""
        return np.repeat(np.cumsum(self.lengths), self.lengths)


@dataclass(frozen=True)
class Batch:
    """Training observations with the expert's next actions; B observations.

    images: (B, cameras, 128, 128, 3) uint8; states: (B, 4); task: (B,) index; actions: (B, chunk, 4);
    valid: (B, chunk) False past the end of the episode; objects: (B, 6) positions of object and goal relative to the
    hand, in metres.
    """

    images: npt.NDArray[np.uint8]
    states: npt.NDArray[np.float32]
    task: npt.NDArray[np.int64]
    actions: npt.NDArray[np.float32]
    valid: npt.NDArray[np.bool_]
    objects: npt.NDArray[np.float32]


def load_shard(task: str, frames: Path) -> Shard:
    """Return the recorded demonstrations of ``task``. Raises FileNotFoundError when they are not complete."""
    table = frames / f"{task}.npz"
    if not table.exists():
        raise FileNotFoundError(
            f"{table}: demonstrations are missing; run `make_dataset.py frames` first"
        )
    data = np.load(table)
    shape = (len(data["states"]), len(CAMERAS), IMAGE_SIZE, IMAGE_SIZE, 3)
    images = np.memmap(frames / f"{task}.raw", dtype=np.uint8, mode="r", shape=shape)
    fields = {
        name: data[name] for name in ("states", "actions", "raw", "lengths", "goals", "seeds")
    }
    return Shard(task=task, images=images, **fields)


class Sampler:
    """Draws batches: a task by weight, a training step of it uniformly, pictures shifted by up to ``shift`` pixels."""

    def __init__(
        self,
        shards: Sequence[Shard],
        weights: Mapping[str, float],
        chunk: int,
        shift: int,
    ) -> None:
        """weights: relative frequency of each task; chunk: number of future actions; shift: in pixels."""
        self.shards = shards
        self.chunk = chunk
        self.shift = shift
        weight = np.array([weights[shard.task] for shard in shards])
        self._probability = weight / weight.sum()
        self._ends = [shard.episode_ends() for shard in shards]

    def draw(self, size: int, rng: np.random.Generator) -> Batch:
        """Return ``size`` observations."""
        tasks = rng.choice(len(self.shards), size=size, p=self._probability)
        steps = np.array([rng.integers(self.shards[task].training_steps) for task in tasks])
        pairs = list(zip(tasks, steps, strict=True))
        ahead = steps[:, None] + np.arange(self.chunk)
        ends = np.array([self._ends[task][step] for task, step in pairs])
        last = np.minimum(ahead, ends[:, None] - 1)
        return Batch(
            images=np.stack(
                [self._shifted(self.shards[task].images[step], rng) for task, step in pairs]
            ),
            states=np.stack([self.shards[task].states[step] for task, step in pairs]),
            task=tasks,
            actions=np.stack(
                [self.shards[task].actions[row] for task, row in zip(tasks, last, strict=True)]
            ),
            valid=ahead < ends[:, None],
            objects=np.stack(
                [relative_objects(self.shards[task].raw[step]) for task, step in pairs]
            ),
        )

    def _shifted(
        self, images: npt.NDArray[np.uint8], rng: np.random.Generator
    ) -> npt.NDArray[np.uint8]:
        """Shift each camera's picture independently, repeating the border: (cameras, H, W, 3) -> the same."""
        padded = np.pad(
            images,
            ((0, 0), (self.shift, self.shift), (self.shift, self.shift), (0, 0)),
            mode="edge",
        )
        offsets = rng.integers(0, 2 * self.shift + 1, size=(len(images), 2))
        return np.stack(
            [
                p[y : y + IMAGE_SIZE, x : x + IMAGE_SIZE]
                for p, (y, x) in zip(padded, offsets, strict=True)
            ]
        )


def relative_objects(raw: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Return object and goal positions relative to the hand, in metres: (39,) privileged observation -> (6,)."""
    hand = raw[0:3]
    return np.concatenate([raw[4:7] - hand, raw[36:39] - hand]).astype(np.float32)


def normalization(shards: Sequence[Shard]) -> dict[str, dict[str, npt.NDArray[np.float32]]]:
    """Return mean, std, min and max (4,) of ``observation.state`` and ``action`` over the training steps of all shards."""
    columns = {
        "observation.state": [shard.states[: shard.training_steps] for shard in shards],
        "action": [shard.actions[: shard.training_steps] for shard in shards],
    }
    joined = {key: np.concatenate(parts).astype(np.float64) for key, parts in columns.items()}
    return {
        key: {
            "mean": value.mean(axis=0).astype(np.float32),
            "std": value.std(axis=0).astype(np.float32),
            "min": value.min(axis=0).astype(np.float32),
            "max": value.max(axis=0).astype(np.float32),
        }
        for key, value in joined.items()
    }
