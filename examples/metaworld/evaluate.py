"""Success of a float checkpoint on unseen goals, run as lerobot runs it: preprocessor, policy, postprocessor in torch.

    python examples/metaworld/evaluate.py --episodes 20

Seeds start at 0; demonstrations start at 100 000 (a test compares the drawn goals). Every episode has its own flow noise,
seeded by the episode, so a quantized policy can be compared on the same seeds and the same noise.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from quantvla.evaluate.metaworld import TASKS, MetaWorldEnv, Observation
from quantvla.float_policy import FloatPolicy

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ChunkFn = Callable[[Observation, npt.NDArray[np.float32]], npt.NDArray[np.float32]]
"""(observation, noise (1, chunk, max_action_dim)) -> actions (executed steps, 4)."""


@dataclass(frozen=True)
class TaskResult:
    """Successes of one task: the seeds that succeeded and failed, and the steps of the successful episodes."""

    task: str
    succeeded: tuple[int, ...]
    failed: tuple[int, ...]
    mean_steps: float

    @property
    def episodes(self) -> int:
        """Number of episodes run."""
        return len(self.succeeded) + len(self.failed)


def wilson(successes: int, episodes: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a success rate."""
    if episodes == 0:
        return 0.0, 1.0
    rate = successes / episodes
    centre = rate + z * z / (2 * episodes)
    margin = z * math.sqrt(rate * (1 - rate) / episodes + z * z / (4 * episodes**2))
    scale = 1 + z * z / episodes
    return max(0.0, (centre - margin) / scale), min(1.0, (centre + margin) / scale)


def torch_policy(directory: Path, threads: int) -> tuple[ChunkFn, tuple[int, ...]]:
    """Return (chunk function, noise shape) of a LeRobot checkpoint directory."""
    policy = FloatPolicy.from_pretrained(directory, threads=threads)

    def chunk(observation: Observation, noise: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return policy.predict_action_chunk(observation, noise=noise)[: policy.execute]

    return chunk, policy.noise_shape


def run_episode(
    env: MetaWorldEnv, chunk: ChunkFn, noise_shape: tuple[int, ...], seed: int
) -> tuple[bool, int]:
    """Return (success, steps) of the episode that ``seed`` defines."""
    rng = np.random.default_rng(seed)
    observation = env.reset(seed)
    steps = 0
    success = False
    while not env.done:
        for action in chunk(observation, rng.standard_normal(noise_shape, dtype=np.float32)):
            success = env.step(action).success
            steps += 1
            if env.done:
                break
        else:
            observation = env.observe()
    return success, steps


def evaluate_task(
    task: str, chunk: ChunkFn, noise_shape: tuple[int, ...], seeds: range
) -> TaskResult:
    """Run one episode a seed and return the outcomes."""
    succeeded: list[int] = []
    failed: list[int] = []
    steps: list[int] = []
    with MetaWorldEnv(task) as env:
        for seed in seeds:
            success, length = run_episode(env, chunk, noise_shape, seed)
            (succeeded if success else failed).append(seed)
            if success:
                steps.append(length)
    return TaskResult(
        task, tuple(succeeded), tuple(failed), float(np.mean(steps)) if steps else math.nan
    )


def main() -> None:
    """Parse the command line, evaluate, print the table and optionally write it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", type=Path, default=Path(__file__).parent / "policy")
    parser.add_argument("--tasks", nargs="+", default=[task.name for task in TASKS])
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the outcomes of every seed here")
    options = parser.parse_args()
    chunk, noise_shape = torch_policy(options.policy, options.threads)
    seeds = range(options.first_seed, options.first_seed + options.episodes)
    results = []
    for task in options.tasks:
        start = time.monotonic()
        result = evaluate_task(task, chunk, noise_shape, seeds)
        results.append(result)
        print(
            row(task, len(result.succeeded), result.episodes),
            f"{time.monotonic() - start:.0f} s",
            flush=True,
        )
    total = sum(len(result.succeeded) for result in results)
    print(row("all", total, sum(result.episodes for result in results)))
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


def row(name: str, successes: int, episodes: int) -> str:
    """Return one line of the table: successes, rate and Wilson interval."""
    low, high = wilson(successes, episodes)
    return f"{name:24s} {successes:4d}/{episodes:<4d} {successes / episodes:6.1%}  [{low:.1%}, {high:.1%}]"


if __name__ == "__main__":
    main()
