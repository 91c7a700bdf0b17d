"""The project's own kernels: a library of operators for ONNX Runtime, where it is built and loads.

Engines do not depend on it: a stage that has a graph of own operators (``StageSpec.native``) has one of
ONNX Runtime's operators too, which runs where the library is missing, does not load or is switched
off (environment variable ``QUANTVLA_KERNELS=off``). Which one it is stands in `available`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantvla.runtime.machine import saturates_u8s8

if TYPE_CHECKING:
    from quantvla.runtime.manifest import StageSpec

LIBRARY = Path(__file__).parent / "libquantvla_kernels.so"
SWITCH = "QUANTVLA_KERNELS"


@dataclass(frozen=True)
class Kernels:
    """The library on this machine.

    ``library`` is None where it cannot be used, for the ``reason``. ``linear`` and ``attention`` name the
    instruction sets that this processor gets.
    """

    library: Path | None
    reason: str = ""
    linear: str = ""
    attention: str = ""
    version: str = ""

    def describe(self) -> str:
        """Return in words what runs integer linears here."""
        if self.library is None:
            return f"ONNX Runtime's ({self.reason})"
        return f"own, {self.linear}, attention {self.attention}"


def available() -> Kernels:
    """Return what can be used here and why."""
    return _load(LIBRARY, os.environ.get(SWITCH, ""))


@lru_cache
def _load(path: Path, switch: str) -> Kernels:
    if switch == "off":
        return Kernels(None, f"own kernels switched off by {SWITCH}")
    if not path.is_file():
        return Kernels(
            None,
            "own kernels are not built: python runtime/kernels/build.py, or install a wheel that has them",
        )
    try:
        library = ctypes.CDLL(str(path))
        for name in ("quantvla_kernels", "quantvla_attention", "quantvla_version"):
            getattr(library, name).restype = ctypes.c_char_p
        _ = library.quantvla_attention_in_float  # an older library has it not
        return Kernels(
            path,
            linear=library.quantvla_kernels().decode(),
            attention=library.quantvla_attention().decode(),
            version=library.quantvla_version().decode(),
        )
    except (OSError, AttributeError) as error:
        return Kernels(None, f"own kernels do not load: {' '.join(str(error).split())}")


BFLOAT16 = "bf16"
"""In the name of attention kernels whose products are of bfloat16 numbers."""


@contextmanager
def float_attention() -> Iterator[None]:
    """Have own attentions multiply float32 numbers while the block runs, as on a processor that has no others.

    In all engines of the process: for comparisons, not for a robot.
    """
    library = available().library
    if library is None:
        yield
        return
    switch = ctypes.CDLL(str(library)).quantvla_attention_in_float
    switch(1)
    try:
        yield
    finally:
        switch(0)


def graph_file(stage: StageSpec) -> str:
    """Return the file of the graph that runs here: of own operators if there is one and all are available."""
    return stage.native if stage.native and available().library is not None else stage.file


SATURATION_SAFE = "session.x64quantprecision"
"""ONNX Runtime's setting that turns int8 weights into uint8 on x86, whose products no kernel saturates."""


def session_options() -> Any:
    """Return ONNX Runtime's session options for right integer sums, own operators registered where there are any.

    `SATURATION_SAFE` is set only where `saturates_u8s8`: the uint8 kernels it leads to take 2.4 to 3.2
    times as long as those with VNNI (measured with 1.32 on Zen 4, for the same numbers).
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if saturates_u8s8():
        options.add_session_config_entry(SATURATION_SAFE, "1")
    found = available()
    if found.library is not None:
        options.register_custom_ops_library(str(found.library))
    return options
