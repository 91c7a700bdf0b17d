"""One entry for every kind of calibration source: what a path is, is decided by its content."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from quantvla.calib_sets.calibration_set import CalibrationSet
from quantvla.calib_sets.card_file import CARD_FILE
from quantvla.calib_sets.lerobot_dataset import INFO_FILE, open_lerobot
from quantvla.calib_sets.npz import open_npz
from quantvla.calib_sets.stored import open_stored
from quantvla.runtime.errors import explain

_KINDS = (
    f"a calibration set ({CARD_FILE}), a LeRobotDataset v3 ({INFO_FILE}) or a directory of *.npz"
)


def open_set(path: Path | str, *, heldout: Collection[int] | None = None) -> CalibrationSet:
    """Return the frames in ``path``: our own set, a LeRobotDataset v3, or a directory of ``*.npz``.

    ``heldout`` names the held-out episodes of a source that has no parts yet. Raises
    `QuantVLAError` for a path that is none of these, or whose content is broken.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise explain(
            directory,
            "is not a directory" if directory.exists() else "does not exist",
            remedy=f"give {_KINDS}",
        )
    given = None if heldout is None else frozenset(heldout)
    if (directory / CARD_FILE).is_file():
        if given is not None:
            raise explain(
                directory,
                "already has a held-out part",
                got=f"held-out episodes {sorted(given)[:5]}",
                remedy="build from the original recording to divide it anew",
            )
        return open_stored(directory)
    if (directory / INFO_FILE).is_file():
        return open_lerobot(directory, given)
    if any(directory.glob("*.npz")):
        return open_npz(directory, given)
    found = ", ".join(sorted(p.name for p in directory.iterdir())[:5]) or "an empty directory"
    raise explain(directory, "holds no calibration frames", got=found, remedy=f"give {_KINDS}")
