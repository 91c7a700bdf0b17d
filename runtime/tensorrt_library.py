"""`tensorrt` (JetPack) or `tensorrt_rtx` (desktop, CI): one API, loaded when it is needed."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any

from quantvla.runtime.errors import explain

_INSTALL = {
    "tensorrt": "install JetPack's python3-libnvinfer and make the environment with "
    "--system-site-packages (docs/jetson.md)",
    "tensorrt_rtx": "pip install 'quantvla[tensorrt-rtx]'",
}


@dataclass(frozen=True)
class Library:
    """An imported TensorRT. ``trt`` is the module; it has no type information."""

    name: str
    version: str
    trt: Any

    @property
    def release(self) -> tuple[int, int]:
        """(major, minor): engines and parsers change with it."""
        major, minor = re.findall(r"\d+", self.version)[:2]
        return int(major), int(minor)


def load_library(name: str) -> Library:
    """Import the TensorRT called ``name``; raises `QuantVLAError` saying how to get it."""
    try:
        trt = importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise explain(
            name, "this Python cannot import it", got=error, remedy=_INSTALL[name]
        ) from error
    return Library(name, str(trt.__version__), trt)


class BuildMessages:
    """What TensorRT says while it parses and builds: problems, and its listing of the engine's layers."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.layers = ""

    def take(self, level: str, message: str) -> None:
        """Keep a message if it matters; ``level`` is the name of its severity."""
        if level in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(message)
        elif level == "WARNING":
            self.warnings.append(message)
        elif message.startswith("Layers:"):
            self.layers = message


def make_logger(library: Library, messages: BuildMessages) -> Any:
    """Return a logger object for the library that feeds ``messages``."""

    class Logger(library.trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            library.trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            messages.take(severity.name, message)

    return Logger()


def make_monitor(library: Library, report: Any) -> Any:
    """Return a progress monitor that calls ``report(phase, done, total)`` for the outermost phases."""

    class Monitor(library.trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            library.trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self._steps[name] = steps
                report(name, 0, steps)

        def step_complete(self, name: str, step: int) -> bool:
            if name in self._steps:
                report(name, step + 1, self._steps[name])
            return True

        def phase_finish(self, name: str) -> None:
            steps = self._steps.pop(name, None)
            if steps is not None:
                report(name, steps, steps)

    return Monitor()
