"""Artefacts several tests need, made once: a random-weight checkpoint and what the compiler makes of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MUJOCO_GL", "egl")

import numpy as np
import pytest
from random_observations import random_observation

if TYPE_CHECKING:
    from quantvla.calib_sets import CalibrationSet


@pytest.fixture(scope="session")
def tiny_size() -> Any:
    import torch

    from quantvla.testing.smolvla import SmolVLASize

    torch.set_num_threads(1)
    return SmolVLASize()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_size: Any) -> Path:
    from quantvla.testing.smolvla import write_random_checkpoint

    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", tiny_size)


@pytest.fixture(scope="session")
def write_npz_set(tiny_size: Any) -> Callable[..., Path]:
    def write(directory: Path, *, episodes: int = 3, frames: int = 4) -> Path:
        directory.mkdir(parents=True)
        for index in range(episodes * frames):
            observation = random_observation(tiny_size, index)
            np.savez(
                directory / f"{index:03d}.npz",
                **observation,
                episode=index // frames,
                frame=index % frames,
            )
        return directory

    return write


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory: pytest.TempPathFactory, write_npz_set: Callable[..., Path]) -> Path:
    return write_npz_set(tmp_path_factory.mktemp("set") / "npz")


@pytest.fixture(scope="session")
def tiny_frames(tiny_set: Path) -> CalibrationSet:
    """Four calibration frames."""
    from quantvla.calib_sets import limit, open_set

    return limit(open_set(tiny_set), frames=4, seed=0).part("calibration")


@pytest.fixture(scope="session")
def tiny_quantized(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, tiny_set: Path
) -> Path:
    from quantvla.calib_sets import open_set
    from quantvla.quantize import quantize
    from quantvla.recipe import read_recipe

    output = tmp_path_factory.mktemp("quantized") / "w4a8"
    quantize(tiny_checkpoint, open_set(tiny_set).part("calibration"), read_recipe("w4a8"), output)
    return output


@pytest.fixture(scope="session")
def tiny_float_engine(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    from quantvla.export.engine import export_engine

    output = tmp_path_factory.mktemp("engines") / "float"
    export_engine(tiny_checkpoint, "cpu", output)
    return output


@dataclass(frozen=True)
class Compiled:
    """A checkpoint and what the compiler makes of it."""

    checkpoint: Path
    quantized: Path
    engine: Path


@pytest.fixture(scope="session")
def wide_heads(tmp_path_factory: pytest.TempPathFactory, tiny_set: Path) -> Compiled:
    """A tiny policy whose attentions are wide enough for the project's own kernels, w4a8."""
    from quantvla.calib_sets import open_set
    from quantvla.export.engine import export_engine
    from quantvla.quantize import quantize
    from quantvla.recipe import read_recipe
    from quantvla.testing.smolvla import SmolVLASize, write_random_checkpoint

    folder = tmp_path_factory.mktemp("wide_heads")
    made = Compiled(folder / "policy", folder / "quantized", folder / "engine")
    write_random_checkpoint(made.checkpoint, SmolVLASize(heads=2, key_value_heads=1, head_dim=32))
    calibration = open_set(tiny_set).part("calibration")
    quantize(made.checkpoint, calibration, read_recipe("w4a8"), made.quantized)
    export_engine(made.quantized, "cpu", made.engine)
    return made


@pytest.fixture(scope="session")
def tiny_integer_engine(tmp_path_factory: pytest.TempPathFactory, tiny_quantized: Path) -> Path:
    from quantvla.export.engine import export_engine

    output = tmp_path_factory.mktemp("engines") / "w4a8"
    export_engine(tiny_quantized, "cpu", output)
    return output
