"""Recording a calibration set on the robot: frame by frame, whole or not at all."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from quantvla.calib_sets.calibration_set import CalibrationSet, FrameTable, assemble
from quantvla.calib_sets.card import Card, ImageFile, RobotSpec, SetSource
from quantvla.calib_sets.card_file import CARD_FILE, encode_card
from quantvla.calib_sets.images import ImageFormat
from quantvla.calib_sets.observation import (
    STATE_KEY,
    TASK_KEY,
    Observation,
    check_observation,
    describe_robot,
)
from quantvla.calib_sets.stored import open_stored
from quantvla.calib_sets.writer import IMAGES_FOLDER, with_images, write_images
from quantvla.runtime.errors import explain
from quantvla.runtime.files import atomic_directory


class _AbandonedError(Exception):
    """The caller's block failed: nothing is kept. Never leaves this file."""


class _NoPixels:
    def load(self, index: int) -> Observation:
        raise AssertionError(f"frame {index} is being recorded")


class Recorder:
    """Writes observations to a calibration set as they come.

        with Recorder("kitchen", name="kitchen") as recorder:
            for frame, observation in enumerate(robot):
                recorder.add(observation, episode=0, frame=frame)

    The set appears when the block ends without an error; an error, Ctrl-C or a killed process
    leaves none (catch KeyboardInterrupt inside the block to end a recording by hand). The last
    20 % of the episodes of each task become the held-out part.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        name: str | None = None,
        robot: RobotSpec | None = None,
        source: SetSource | None = None,
        image_format: ImageFormat = "jpeg",
        heldout: Collection[int] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Prepare a recording to ``path``; without ``robot`` the first observation describes it."""
        self.path = Path(path)
        self.name = name or self.path.name
        self._robot = robot
        self._source = source or SetSource(kind="recording", name=self.name)
        self._format: ImageFormat = image_format
        self._heldout = heldout
        self._overwrite = overwrite
        self._stack = ExitStack()
        self._directory: Path | None = None
        self._rows: list[tuple[int, int, str, Any]] = []
        self._images: list[dict[str, ImageFile]] = []

    def __enter__(self) -> Recorder:
        """Begin. Raises `QuantVLAError` if the path is taken or cannot be written."""
        self._directory = self._stack.enter_context(
            atomic_directory(self.path, overwrite=self._overwrite)
        )
        (self._directory / IMAGES_FOLDER).mkdir()
        return self

    def add(self, observation: Mapping[str, Any], *, episode: int, frame: int) -> None:
        """Write one observation. Raises `QuantVLAError` for a wrong one, or when the disk is full."""
        if self._directory is None:
            raise explain(
                self.path, "is not being recorded", remedy="use `with Recorder(...) as recorder:`"
            )
        where = f"{self.path} episode {episode} frame {frame}"
        if self._robot is None:
            self._robot = describe_robot(where, observation)
        checked = check_observation(where, observation, self._robot)
        self._images.append(
            write_images(self._directory, len(self._rows), checked, self._robot, self._format)
        )
        self._rows.append((int(episode), int(frame), checked[TASK_KEY], checked[STATE_KEY]))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish the set, or leave nothing if the block failed."""
        directory, self._directory = self._directory, None
        assert directory is not None
        try:
            if error is not None:
                raise _AbandonedError
            card = self._card(directory)
            (directory / CARD_FILE).write_bytes(encode_card(card))
        except BaseException as failure:
            with suppress(_AbandonedError):
                self._stack.__exit__(type(failure), failure, failure.__traceback__)
                raise
        else:
            self._stack.close()

    def _card(self, directory: Path) -> Card:
        """Return the card of what was recorded; the pictures of frames that no part holds are removed."""
        if self._robot is None or not self._rows:
            raise explain(self.path, "no frame was recorded", remedy="call add() at least 4 times")
        episodes, frames, tasks, states = zip(*self._rows, strict=True)
        recorded = assemble(
            self.path,
            self.name,
            source=self._source,
            robot=self._robot,
            table=FrameTable(episodes, frames, tasks, np.stack(states)),
            loader=_NoPixels(),
            heldout=self._heldout,
        )
        for row in set(range(len(self._rows))) - set(recorded.positions):
            for image in self._images[row].values():
                (directory / image.file).unlink()
        return with_images(
            recorded, [self._images[p] for p in recorded.positions], recorded.card.name, self.path
        )


def record(
    observations: Iterable[tuple[Mapping[str, Any], int, int]],
    path: Path | str,
    *,
    name: str | None = None,
    robot: RobotSpec | None = None,
    source: SetSource | None = None,
    image_format: ImageFormat = "jpeg",
    heldout: Collection[int] | None = None,
    overwrite: bool = False,
) -> CalibrationSet:
    """Record (observation, episode, frame) triples to ``path`` and return the set, opened."""
    with Recorder(
        path,
        name=name,
        robot=robot,
        source=source,
        image_format=image_format,
        heldout=heldout,
        overwrite=overwrite,
    ) as recorder:
        for observation, episode, frame in observations:
            recorder.add(observation, episode=episode, frame=frame)
    return open_stored(Path(path))
