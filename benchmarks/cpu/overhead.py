"""Share of a tick that the runtime spends outside ONNX Runtime: preprocessing, the loop, postprocessing.

    python benchmarks/cpu/overhead.py --calib calib_sets/metaworld --output benchmarks/cpu/overhead.json ENGINE...

A tick is ``Policy.predict_action_chunk`` on a recorded frame, noise from the policy's own generator. The clock is that of the process's CPU time, one thread,
so that other processes on the machine do not count.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from quantvla.calib_sets import open_set
from quantvla.fidelity.trajectories import visible
from quantvla.runtime.machine import processor
from quantvla.runtime.policy import Policy

TICKS, WARMUP = 60, 5


class Clock:
    """CPU time inside the calls it wraps, in seconds."""

    def __init__(self) -> None:
        self.inside_s = 0.0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``call`` with its time added up."""

        def timed(*arguments: Any) -> Any:
            start = time.thread_time()
            try:
                return call(*arguments)
            finally:
                self.inside_s += time.thread_time() - start

        return timed


def measure(engine: Path, calib: Path) -> dict[str, float]:
    """Return milliseconds of a tick and of its parts, medians, and the share outside ONNX Runtime."""
    sessions, before = Clock(), Clock()
    ticks = []
    frames = [frame.observation for frame in open_set(calib).part("heldout")]
    with Policy.from_pretrained(engine, threads=1) as policy:
        for session in policy._engine._sessions.values():  # type: ignore[union-attr]
            session._session = _Wrapped(session._session, sessions)  # type: ignore[attr-defined]
        policy.preprocessor = _Preprocessor(policy.preprocessor, before)  # type: ignore[assignment]
        for index in range(TICKS + WARMUP):
            observation = visible(policy, frames[index % len(frames)])
            sessions.inside_s = before.inside_s = 0.0
            start = time.thread_time()
            policy.predict_action_chunk(observation)
            ticks.append((time.thread_time() - start, sessions.inside_s, before.inside_s))
    whole, inside, preprocess = (
        [1e3 * value for value in column] for column in zip(*ticks[WARMUP:], strict=True)
    )
    outside = [(a - b) / a for a, b in zip(whole, inside, strict=True)]
    rest = [a - b - c for a, b, c in zip(whole, inside, preprocess, strict=True)]
    return {
        "tick_ms": round(median(whole), 3), "onnxruntime_ms": round(median(inside), 3),
        "preprocess_ms": round(median(preprocess), 3), "rest_ms": round(median(rest), 3),
        "share_outside": round(median(outside), 4),
        "share_without_preprocess": round(median([a / b for a, b in zip(rest, whole, strict=True)]), 4),
    }  # fmt: skip


class _Wrapped:
    def __init__(self, session: Any, clock: Clock) -> None:
        self.run = clock.around(session.run)


class _Preprocessor:
    def __init__(self, preprocessor: Any, clock: Clock) -> None:
        self._call, self.keys = clock.around(preprocessor), preprocessor.keys

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)


def main() -> None:
    """Measure each engine, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engines", nargs="+", type=Path)
    for name in ("calib", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    result = {engine.name: measure(engine, options.calib) for engine in options.engines}
    for name, row in result.items():
        print(name, row)
    content = {"processor": processor(), "threads": 1, "ticks": TICKS, "engines": result}
    options.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
