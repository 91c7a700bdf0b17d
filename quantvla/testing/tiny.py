"""The smallest policy of every family, for one robot: what tests and demonstrations of a family start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from quantvla.testing import groot, pi, smolvla


@dataclass(frozen=True)
class Tiny:
    """``write(directory)`` writes a random-weight checkpoint; ``size`` has the robot's and the chunk's dimensions."""

    write: Callable[[Path], Path]
    size: Any


TINY: dict[str, Tiny] = {
    "smolvla": Tiny(smolvla.write_random_checkpoint, smolvla.SmolVLASize()),
    "pi0": Tiny(partial(pi.write_random_checkpoint, "pi0"), pi.PiSize()),
    "pi05": Tiny(partial(pi.write_random_checkpoint, "pi05"), pi.PiSize()),
    "groot": Tiny(groot.write_random_checkpoint, groot.GrootSize()),
}
