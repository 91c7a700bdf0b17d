"""Stops the robot when the loop's own thread is stuck, and tells the outside that it is alive."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_POLL_S = 0.01
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WatchdogOptions:
    """How long things may last, in seconds.

    ``robot_s``: one call of ``observe`` or ``act`` before the robot is stopped from outside the
    loop; ``inference_s``: one inference, and ``hold_s``: holding without a break, before the loop
    stops the robot. ``heartbeat`` is a file whose modification time is renewed every
    ``heartbeat_s`` while the loop ticks, for a supervisor outside this process.
    """

    robot_s: float = 0.5
    inference_s: float = 5.0
    hold_s: float = 5.0
    heartbeat: Path | None = None
    heartbeat_s: float = 0.5


class Watchdog:
    """Watches the loop's calls of the robot from a thread of its own.

    A call that lasts longer than ``robot_s`` trips it: ``stop`` is called from here, at once, and
    ``tripped`` says why, so that the loop sends nothing more when the call returns.
    """

    def __init__(self, stop: Callable[[], None], options: WatchdogOptions) -> None:
        self.options = options
        self.tripped: str | None = None
        self._stop = stop
        self._call: tuple[str, float] | None = None
        self._ticked = False
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the block runs; the heartbeat file is removed at its end."""
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()
        try:
            yield
        finally:
            self._ended.set()
            self._thread.join(timeout=1.0)
            if self.options.heartbeat is not None:
                self.options.heartbeat.unlink(missing_ok=True)

    @contextmanager
    def call(self, what: str) -> Iterator[None]:
        """Watch one call of the robot."""
        self._call = (what, time.monotonic())
        try:
            yield
        finally:
            self._call = None

    def ticked(self) -> None:
        """Note that the loop has come round."""
        self._ticked = True

    def _run(self) -> None:
        beaten_s = 0.0
        while not self._ended.wait(_POLL_S):
            now_s = time.monotonic()
            call = self._call
            if call is not None and self.tripped is None and now_s - call[1] > self.options.robot_s:
                self._trip(f"robot {call[0]} has not returned for {self.options.robot_s:g} s")
            if self._ticked and now_s - beaten_s >= self.options.heartbeat_s:
                self._ticked, beaten_s = False, now_s
                self._beat()

    def _trip(self, why: str) -> None:
        self.tripped = why
        _logger.error("%s; stopping the robot", why)
        try:
            self._stop()
        except Exception as error:  # whatever a driver raises; the loop tries once more at its end
            self.tripped = f"{why}; its stop failed: {error}"
            _logger.exception("the robot's stop failed")

    def _beat(self) -> None:
        path = self.options.heartbeat
        if path is None:
            return
        try:
            path.touch()
        except OSError as error:
            _logger.warning("%s: heartbeat could not be written: %s", path, error)
