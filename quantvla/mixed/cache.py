"""Where measurements are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "QUANTVLA_CACHE"


def cache_directory() -> Path:
    """Return ``$QUANTVLA_CACHE``, or ``quantvla`` below ``$XDG_CACHE_HOME`` (``~/.cache``)."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantvla"
