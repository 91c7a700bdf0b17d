"""Settings of the interpreter under which a thread wakes on time beside others."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_SWITCH_S = 0.0005


@contextmanager
def prompt_interpreter() -> Iterator[None]:
    """While the block runs: hand over the interpreter lock after 0.5 ms, and do not walk old objects for garbage.

    By default a thread that wakes waits up to 5 ms for one that computes in Python, and a full
    garbage collection with a loaded engine takes tens of milliseconds.
    """
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        sys.setswitchinterval(interval_s)
