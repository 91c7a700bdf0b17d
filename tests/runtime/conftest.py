from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_engine import write_engine

from quantvla.runtime.policy import Policy


@pytest.fixture(scope="session")
def pristine_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_engine(tmp_path_factory.mktemp("engine") / "tiny")


@pytest.fixture
def engine(pristine_engine: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(pristine_engine, tmp_path / "engine"))


@pytest.fixture
def policy(pristine_engine: Path) -> Iterator[Policy]:
    with Policy.from_pretrained(pristine_engine, threads=1) as loaded:
        yield loaded
