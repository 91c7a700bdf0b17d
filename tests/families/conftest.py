"""Every family's tiny policy and what the compiler makes of it, each made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantvla.calib_sets import CalibrationSet, open_set
from quantvla.export.engine import export_engine
from quantvla.families import FAMILIES
from quantvla.quantize import quantize
from quantvla.recipe import read_recipe
from quantvla.testing.tiny import TINY


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def size(family: str) -> Any:
    return TINY[family].size


@pytest.fixture(scope="session")
def checkpoint(
    family: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    if family == "smolvla":
        return Path(request.getfixturevalue("tiny_checkpoint"))
    return TINY[family].write(tmp_path_factory.mktemp(family) / "tiny")


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.fixture(scope="session")
def frames(tiny_set: Path) -> CalibrationSet:
    return open_set(tiny_set).part("calibration")


@pytest.fixture(scope="session")
def heldout(tiny_set: Path) -> CalibrationSet:
    return open_set(tiny_set).part("heldout")


@pytest.fixture(scope="session")
def quantized(
    checkpoint: Path, frames: CalibrationSet, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The whole method: smoothing, folds, rotations, rounding, attention corrections."""
    output = tmp_path_factory.mktemp("quantized") / "out"
    quantize(checkpoint, frames, read_recipe("quantvla-w4a8"), output)
    return output


@pytest.fixture(scope="session")
def float_engine(
    family: str,
    checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Path:
    if family == "smolvla":
        return Path(request.getfixturevalue("tiny_float_engine"))
    output = tmp_path_factory.mktemp("engine") / "float"
    export_engine(checkpoint, "cpu", output)
    return output


@pytest.fixture(scope="session")
def integer_engine(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("engine") / "integer"
    export_engine(quantized, "cpu", output)
    return output


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny checkpoint of one family, for tests of that family alone."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = TINY[name].write(tmp_path_factory.mktemp(name) / "tiny")
        return made[name]

    return get
