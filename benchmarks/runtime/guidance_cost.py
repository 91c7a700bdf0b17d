"""What real-time chunking costs and how close it is to lerobot's, on the same observations and noise.

    python benchmarks/runtime/guidance_cost.py examples/metaworld/policy build/engines/guided -o benchmarks/runtime/guidance.json

The engine is the float one, exported with `--guidance`. lerobot's RTC takes the identity for the
Jacobian (its velocity is computed before the input asks for a gradient), which is method `forward`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from episodes import pinned
from rich.console import Console

from quantvla.calib_sets import open_set
from quantvla.float_policy import FloatPolicy
from quantvla.runtime.guidance import METHODS, ActionPrefix
from quantvla.runtime.policy import Policy

FROZEN, OVERLAP, MAX_WEIGHT = 4, 10, 10.0


def main() -> None:
    """Compare and time all methods on held-out frames, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("engine", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--set", type=Path, default=Path("calib_sets/metaworld"))
    parser.add_argument("--frames", type=int, default=16)
    given = parser.parse_args()
    frames = [f.observation for f in open_set(given.set).part("heldout")][: given.frames + 1]
    reference = FloatPolicy.from_pretrained(given.checkpoint, threads=1)
    result: dict[str, Any] = {
        "engine": pinned(given.engine),
        "frames": len(frames) - 1,
        "threads": 1,
    }
    with Policy.from_pretrained(given.engine, threads=1) as policy:
        policy.load_guidance()
        policy.warm_up(3)
        lerobot = [
            _lerobot(reference, policy, old, new, i) for i, (old, new) in enumerate(_pairs(frames))
        ]
        for method in (None, *METHODS):
            chunks, times = [], []
            for index, (old, new) in enumerate(_pairs(frames)):
                prefix = None if method is None else _prefix(policy, old, index, method)
                start_s = time.perf_counter()
                chunks.append(policy.predict_action_chunk(new, seed=index, prefix=prefix))
                times.append((time.perf_counter() - start_s) * 1e3)
            planned = [_old(policy, old, i)[FROZEN:] for i, (old, _) in enumerate(_pairs(frames))]
            jump = [
                np.abs(c[:FROZEN] - p[:FROZEN]).mean() for c, p in zip(chunks, planned, strict=True)
            ]
            error = [np.abs(c - x).max() for c, (x, _) in zip(chunks, lerobot, strict=True)]
            result[method or "none"] = {
                "chunk_ms_p50": round(float(np.median(times)), 2),
                "frozen_rows_mean_abs_to_old_chunk": float(np.mean(jump)),
                "max_abs_to_lerobot_rtc": float(np.max(error)),
            }
        result["lerobot"] = {"chunk_ms_p50": round(float(np.median([t for _, t in lerobot])), 2)}
    result["command"] = (
        f"python benchmarks/runtime/guidance_cost.py {pinned(given.checkpoint)} {pinned(given.engine)}"
    )
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    Console().print_json(json.dumps(result))


def _pairs(frames: list[Any]) -> list[tuple[Any, Any]]:
    return list(itertools.pairwise(frames))


def _old(policy: Policy, obs: Any, index: int) -> Any:
    return policy.predict_action_chunk(obs, seed=1000 + index)


def _prefix(policy: Policy, old: Any, index: int, method: Any) -> ActionPrefix:
    planned = _old(policy, old, index)[FROZEN:]
    return ActionPrefix(planned, FROZEN, OVERLAP, "linear", method, MAX_WEIGHT)


def _lerobot(
    reference: FloatPolicy, policy: Policy, old: Any, new: Any, index: int
) -> tuple[Any, float]:
    """Return lerobot's own RTC chunk (horizon, dim) in physical units, and its time in ms."""
    from lerobot.configs import RTCAttentionSchedule
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    model: Any = reference.loaded.policy
    model.config.rtc_config = RTCConfig(
        prefix_attention_schedule=RTCAttentionSchedule.LINEAR,
        max_guidance_weight=MAX_WEIGHT,
        execution_horizon=OVERLAP,
    )
    model.init_rtc_processor()
    left_over = policy.postprocessor.normalize(_old(policy, old, index)[FROZEN:])
    start_s = time.perf_counter()
    chunk = model.predict_action_chunk(
        reference._before(reference._batch(new)),
        noise=torch.from_numpy(policy.sample_noise(index)),
        inference_delay=FROZEN,
        prev_chunk_left_over=torch.from_numpy(left_over),
    )
    actions = np.asarray(reference._after(chunk[0]).detach().numpy(), np.float32)
    return actions, (time.perf_counter() - start_s) * 1e3


if __name__ == "__main__":
    main()
