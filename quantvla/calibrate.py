"""Calibration: run the float policy over the set, all denoise steps, and measure every site's input."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save

from quantvla.calib_sets import CalibrationSet
from quantvla.families.base import LoadedPolicy
from quantvla.progress import Progress
from quantvla.runtime.files import write_atomic
from quantvla.staged import make_preprocessor, prepare, run_context, sample, without_padding
from quantvla.statistics import SiteStatistics, observe, require_calls, require_finite

SAVE_EVERY_FRAMES = 16
SAVE_EVERY_SECONDS = 60
"""Whichever comes first; a frame of a policy of billions of parameters takes a minute."""


def frame_noise(seed: int, frame: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """Return the flow noise of a calibration or verification frame: standard normal, float32."""
    return np.random.default_rng((seed, frame)).standard_normal(tuple(shape), np.float32)


def collect_statistics(
    loaded: LoadedPolicy,
    sites: Sequence[str],
    frames: CalibrationSet,
    *,
    seed: int,
    journal: Path,
    progress: Progress,
) -> dict[str, SiteStatistics]:
    """Return the statistics of ``sites`` over all ``frames`` and all calls of their stages.

    Progress is kept in the directory ``journal`` every few frames, so that a killed run continues;
    the result does not depend on where it was interrupted.
    """
    widths = {site.name: site.in_features for site in loaded.sites}
    statistics, done = _read_journal(journal, {name: widths[name] for name in sites})
    preprocess = make_preprocessor(loaded.interface)
    noise_shape = loaded.interface.sampler.noise_shape
    repeats = {stage.name: stage.repeat for stage in loaded.stages}
    stage_of = {site.name: site.stage for site in loaded.sites}
    calls = {name: len(frames) * repeats[stage_of[name]] for name in sites}
    saved = time.monotonic()
    with observe(loaded.policy, statistics, calls):
        for index in range(done, len(frames)):
            progress("calibrating", index, len(frames))
            tensors = without_padding(loaded, prepare(preprocess, frames[index].observation))
            sample(loaded, run_context(loaded, tensors), frame_noise(seed, index, noise_shape))
            due = time.monotonic() - saved > SAVE_EVERY_SECONDS
            if due or (index + 1) % SAVE_EVERY_FRAMES == 0 or index + 1 == len(frames):
                require_finite(statistics, index)
                _write_journal(journal, statistics, index + 1)
                saved = time.monotonic()
    progress("calibrating", len(frames), len(frames))
    require_calls(statistics, calls.items())
    return statistics


def _write_journal(journal: Path, statistics: dict[str, SiteStatistics], frames: int) -> None:
    tensors = {}
    counts = {}
    for name, site in statistics.items():
        tensors[f"{name}.sum_squares"], tensors[f"{name}.halves"] = site.sum_squares, site.halves
        tensors[f"{name}.rows"] = site.rows
        counts[name] = [site.calls, site.tokens]
    metadata = {"frames": str(frames), "counts": json.dumps(counts)}
    write_atomic(journal / "statistics.safetensors", save(tensors, metadata))


def _read_journal(journal: Path, widths: dict[str, int]) -> tuple[dict[str, SiteStatistics], int]:
    path = journal / "statistics.safetensors"
    if not path.is_file():
        return {name: SiteStatistics.empty(width) for name, width in widths.items()}, 0
    with safe_open(path, framework="pt") as stored:
        metadata = stored.metadata()
    tensors, counts = load_file(path), json.loads(metadata["counts"])
    statistics = {
        name: SiteStatistics(
            tensors[f"{name}.sum_squares"],
            tensors[f"{name}.halves"],
            tensors[f"{name}.rows"],
            calls=counts[name][0],
            tokens=counts[name][1],
        )
        for name in widths
    }
    return statistics, int(metadata["frames"])
