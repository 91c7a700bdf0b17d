"""One episode: a policy in a simulator until it succeeds or runs out of time."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quantvla.evaluate.arms import ChunkPolicy, Contract
from quantvla.evaluate.environment import Environment
from quantvla.runtime.errors import explain

EPISODES_PER_SEED = 1000
"""Evaluation ``seed`` s runs the environment seeds s * 1000 ... s * 1000 + 999."""
DEMONSTRATION_SEEDS_FROM = 100_000
"""Demonstrations for training and calibration were drawn at this environment seed and above."""
SEEDS = DEMONSTRATION_SEEDS_FROM // EPISODES_PER_SEED


@dataclass(frozen=True)
class Trajectory:
    """What happened: the actions that were run (steps, dim), whether they solved the task, the summed reward."""

    actions: npt.NDArray[np.float32]
    success: bool
    total_reward: float


def environment_seed(seed: int, episode: int) -> int:
    """Return the environment seed of an episode: disjoint between seeds, and from the demonstrations'."""
    if not 0 <= seed < SEEDS:
        raise explain(
            "seed", f"expected 0 to {SEEDS - 1}", got=seed, remedy="choose a seed in that range"
        )
    if not 0 <= episode < EPISODES_PER_SEED:
        raise explain(
            "episodes",
            f"a seed has {EPISODES_PER_SEED} episodes per task",
            got=episode + 1,
            remedy="ask for fewer, or run another seed too",
        )
    return seed * EPISODES_PER_SEED + episode


def chunk_noise(
    seed: int, task: str, episode: int, chunk: int, shape: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    """Return the flow noise of one chunk: the same for every arm, whatever else is evaluated."""
    generator = np.random.default_rng([seed, zlib.crc32(task.encode()), episode, chunk])
    return generator.standard_normal(shape, dtype=np.float32)


def run_episode(
    policy: ChunkPolicy,
    contract: Contract,
    environment: Environment,
    task: str,
    episode: int,
    *,
    seed: int,
    execute: int | None = None,
) -> Trajectory:
    """Run one episode of ``task``: of each chunk ``execute`` actions (the policy's own number if None).

    Pictures are rendered only when a chunk is needed. Raises `QuantVLAError` for a chunk that
    has not the contract's shape or is not finite.
    """
    execute = execute or contract.execute
    observation = environment.reset(environment_seed(seed, episode))
    actions: list[npt.NDArray[np.float32]] = []
    success, total_reward, chunk_index = False, 0.0, 0
    while not environment.done:
        if chunk_index > 0:
            observation = environment.observe()
        noise = chunk_noise(seed, task, episode, chunk_index, contract.noise_shape)
        visible = {key: observation[key] for key in contract.observation_keys}
        chunk = policy.predict_action_chunk(visible, noise=noise)
        _check_chunk(chunk, contract, execute)
        for action in chunk[:execute]:
            step = environment.step(action)
            actions.append(action)
            total_reward += step.reward
            success = step.success
            if environment.done:
                break
        chunk_index += 1
    return Trajectory(np.stack(actions), success, total_reward)


def _check_chunk(chunk: npt.NDArray[np.float32], contract: Contract, execute: int) -> None:
    """Raise for a chunk that is not finite or not as long and wide as the contract says.

    Some policies hand out only what is executed of a chunk, so that is a length too, where ``execute`` are there.
    """
    rows, dim = contract.horizon, contract.action_dim
    lengths = {length for length in (rows, contract.execute) if length >= execute}
    if chunk.shape[1:] != (dim,) or len(chunk) not in lengths:
        raise explain(
            "action chunk",
            f"expected {dim} actions a row and {' or '.join(map(str, sorted(lengths)))} rows",
            got=chunk.shape,
            remedy="export the policy again",
        )
    if not np.isfinite(chunk).all():
        raise explain(
            "action chunk", "not finite", got="nan or inf", remedy="verify the engine first"
        )
