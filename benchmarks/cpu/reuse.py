"""What reuse saves in a tick, and the error of taking the tokens of a picture again that changed by the threshold.

    python benchmarks/cpu/reuse.py --calib calib_sets/metaworld --output benchmarks/cpu/reuse.json ENGINE

ENGINE was exported with ``--cameras-apart``. Times: CPU time of ``Policy.predict_action_chunk``, one thread, ways in
turns. Error: noise of a mean absolute difference of the threshold is put on both pictures of held-out
frames; the chunk from the first pictures' tokens against the chunk from the second's own.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from quantvla.calib_sets import open_set
from quantvla.fidelity.action_error import chunk_errors, relative_rms
from quantvla.fidelity.trajectories import visible
from quantvla.runtime.machine import processor
from quantvla.runtime.policy import Policy
from quantvla.runtime.reuse import ReuseSpec

THRESHOLDS = (0.5, 1.0, 2.0, 3.0)
TICKS, WARMUP = 40, 4
Frame = dict[str, Any]


def noisy(frame: Frame, keys: list[str], size: float, rng: np.random.Generator) -> Frame:
    """Return the frame with Gaussian noise on its pictures whose mean absolute difference is at most ``size``, nearly."""
    changed = dict(frame)
    for key in keys:
        picture = np.asarray(frame[key])
        for sigma in np.linspace(1.6 * size, 0, 33):
            found = np.clip(np.rint(picture + rng.normal(0, sigma, picture.shape)), 0, 255)
            if np.abs(found - picture).mean() <= size:
                break
        changed[key] = found.astype(np.uint8)
    return changed


def times(engine: Path, frame: Frame, keys: list[str]) -> dict[str, float]:
    """Return milliseconds of a tick: everything computed, one camera, both, and the prefix reused."""
    rng = np.random.default_rng(0)
    ways = {
        "all computed": (None, 2, True), "one camera reused": (0.0, 1, True), "both cameras reused": (0.0, 0, True),
        "prefix reused": (0.0, 0, False),
    }  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in ways}
    policies = {
        name: Policy.from_pretrained(engine, threads=1, reuse=ReuseSpec(cameras=cameras, prefix=not moves))
        for name, (cameras, _, moves) in ways.items()
    }  # fmt: skip
    for turn in range(TICKS + WARMUP):
        for name, (_, changing, moves) in ways.items():
            observation = noisy(frame, keys[:changing], 1.0, rng)
            if moves:
                state = np.asarray(observation["observation.state"], np.float32)
                observation["observation.state"] = state + np.float32(1e-3 * turn)
            start = time.thread_time()
            policies[name].predict_action_chunk(observation, seed=turn)
            found[name].append(1e3 * (time.thread_time() - start))
    for policy in policies.values():
        policy.close()
    return {name: round(median(values[WARMUP:]), 2) for name, values in found.items()}


def errors(
    engine: Path, frames: list[Frame], keys: list[str], threshold: float
) -> dict[str, float]:
    """Return the relative action error of chunks from the tokens of pictures that differ by the threshold."""
    rng = np.random.default_rng(0)
    reused, fresh = [], []
    with (
        Policy.from_pretrained(engine, threads=1, reuse=ReuseSpec(cameras=threshold)) as policy,
        Policy.from_pretrained(engine, threads=1) as plain,
    ):
        shape = policy.manifest.sampler.noise_shape
        for frame in frames:
            noise = rng.standard_normal(shape, np.float32)
            other = noisy(frame, keys, threshold, rng)
            policy.reset()
            policy.predict(frame, noise=noise)
            reused.append(policy.predict(other, noise=noise).normalized[0])
            fresh.append(plain.predict(other, noise=noise).normalized[0])
        counts = policy.reuse_counts
        assert counts is not None and counts.images_reused == counts.images // 2, counts
        action = policy.manifest.action
    a, b = (np.stack(x)[:, : action.horizon, : action.dim] for x in (reused, fresh))
    return {
        "threshold": threshold, "nrmse": round(relative_rms(a, b, axes=(0, 1, 2))[0], 5),
        "nrmse_median": round(float(np.median(chunk_errors(a, b))), 5),
    }  # fmt: skip


def motion(calib: Path, keys: list[str]) -> float:
    """Return the median difference of pictures of two successive selected frames of one episode."""
    chosen, found = open_set(calib), []
    entries = list(zip(chosen.card.frames, chosen, strict=True))
    for (before, first), (after, second) in pairwise(entries):
        if before.episode == after.episode:
            found += [
                float(np.abs(np.asarray(first.observation[k], float) - second.observation[k]).mean())
                for k in keys
            ]  # fmt: skip
    return round(median(found), 2)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", type=Path)
    for name in ("calib", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=32)
    options = parser.parse_args()
    heldout = open_set(options.calib).part("heldout")
    with Policy.from_pretrained(options.engine, threads=1) as policy:
        frames = [visible(policy, heldout[i].observation) for i in range(options.frames)]
        keys = [camera.key for camera in policy.manifest.cameras]
    result = {
        "processor": processor(), "threads": 1, "frames": options.frames,
        "tick_ms": times(options.engine, frames[0], keys),
        "picture_difference_of_moving_scene": motion(options.calib, keys),
        "errors": [errors(options.engine, frames, keys, t) for t in THRESHOLDS],
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
