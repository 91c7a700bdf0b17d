"""Observations of an invented robot, small enough that a set of them takes no time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from invented_robot import HEIGHT, TOP, WIDTH, WRIST, Episodes, Observe

from quantvla.calib_sets import CalibrationSet, Observation, record


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the flush of 120 small files to a busy disk: a second per set, and no test can see it."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


@pytest.fixture
def observe() -> Observe:
    """Return a function that gives the observation of (episode, frame): two cameras, three joints."""

    def make(episode: int = 0, frame: int = 0, task: str = "pick the cube") -> Observation:
        rng = np.random.default_rng([episode, frame])
        rows = np.linspace(0, 200, HEIGHT)[:, None, None] + rng.uniform(0, 50, (1, WIDTH, 3))
        return {
            TOP: rows.astype(np.uint8),
            WRIST: rows[::-1].astype(np.uint8),
            "observation.state": np.array([0.1 * frame, episode, -0.3], dtype=np.float32),
            "task": task,
        }

    return make


@pytest.fixture
def episodes(observe: Observe) -> Episodes:
    """Return a function that gives (observation, episode, frame) of whole recordings.

    Tasks take turns; after ``moving`` frames the robot stands still.
    """

    def make(
        count: int = 6, frames: int = 10, tasks: int = 2, moving: int = 10
    ) -> Iterator[tuple[Observation, int, int]]:
        for episode in range(count):
            for frame in range(frames):
                observation = observe(episode, frame, f"task {episode % tasks}")
                observation["observation.state"][0] = 0.1 * min(frame, moving)
                yield observation, episode, frame

    return make


@pytest.fixture
def stored(tmp_path: Path, episodes: Episodes) -> CalibrationSet:
    """Return a recorded set in ``tmp_path / "set"``: 6 episodes of 10 frames, 2 tasks."""
    return record(episodes(), tmp_path / "set")


@pytest.fixture
def npz_directory(tmp_path: Path, episodes: Episodes) -> Path:
    """Return a directory of NPZ files: the same frames as in ``stored``."""
    directory = tmp_path / "npz"
    directory.mkdir()
    for index, (observation, episode, frame) in enumerate(episodes()):
        np.savez(directory / f"{index:04d}.npz", **observation, episode=episode, frame=frame)
    return directory
