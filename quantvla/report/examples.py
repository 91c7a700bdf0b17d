"""Action chunks of a float policy and engines on the same observations and noise, for the overlay plot."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt

from quantvla.calib_sets import CalibrationSet, Frame
from quantvla.calibrate import frame_noise
from quantvla.evaluate.arms import ChunkPolicy
from quantvla.float_policy import FloatPolicy
from quantvla.report.structure import ChunkExample
from quantvla.runtime.policy import Policy

_LABEL_CHARACTERS = 24


def chunk_examples(
    checkpoint: Path,
    engines: Mapping[str, Path],
    frames: CalibrationSet,
    *,
    count: int,
    seed: int,
) -> tuple[ChunkExample, ...]:
    """Return the chunks of ``float_policy`` and of every engine on ``count`` frames of different tasks."""
    with ExitStack() as stack:
        policy = FloatPolicy.from_pretrained(checkpoint)
        opened = {
            name: stack.enter_context(Policy.from_pretrained(path))
            for name, path in engines.items()
        }
        arms: dict[str, ChunkPolicy] = {"float_policy": policy, **opened}
        action = policy.loaded.interface.action
        names = action.names or tuple(f"action {index}" for index in range(action.dim))
        return tuple(
            ChunkExample(
                label=frame.task[:_LABEL_CHARACTERS],
                execute=action.execute,
                action_names=names,
                chunks=_predict(arms, frame, frame_noise(seed, index, policy.noise_shape)),
            )
            for index, frame in enumerate(_of_different_tasks(frames, count))
        )


def _predict(
    arms: Mapping[str, ChunkPolicy], frame: Frame, noise: npt.NDArray[np.float32]
) -> dict[str, tuple[tuple[float, ...], ...]]:
    chunks = {
        name: policy.predict_action_chunk(frame.observation, noise=noise)
        for name, policy in arms.items()
    }
    return {name: tuple(map(tuple, chunk.tolist())) for name, chunk in chunks.items()}


def _of_different_tasks(frames: CalibrationSet, count: int) -> list[Frame]:
    """Return the middle frame of each of the first ``count`` tasks."""
    by_task: dict[str, list[Frame]] = {}
    for frame in frames:
        by_task.setdefault(frame.task, []).append(frame)
    return [found[len(found) // 2] for found in list(by_task.values())[:count]]
