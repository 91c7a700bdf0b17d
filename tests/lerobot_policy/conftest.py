from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def one_camera_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """lerobot's Meta-World has one camera, so the policy for it has one."""
    from quantvla.export.engine import export_engine
    from quantvla.testing.smolvla import SmolVLASize, write_random_checkpoint

    size = SmolVLASize(
        cameras=("observation.images.corner2",), camera_height=480, camera_width=480, state_dim=4
    )
    folder = tmp_path_factory.mktemp("one_camera")
    export_engine(write_random_checkpoint(folder / "checkpoint", size), "cpu", folder / "engine")
    return folder / "engine"
