"""The one error type people see, and how its message is formed.

Every message reads ``<the thing>: <what is wrong>, got <value>; <what to do>``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QuantVLAError(Exception):
    """Bad input, named so that the reader can act on it. The CLI prints it in one line, exit code 2."""


def explain(thing: object, wrong: str, *, got: object = None, remedy: str) -> QuantVLAError:
    """Return the error for ``thing``: what is wrong with it, what was found, what to do.

    ``got=None`` leaves the value out of the message.
    """
    found = "" if got is None else f", got {got}"
    return QuantVLAError(f"{thing}: {wrong}{found}; {remedy}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the remedy for an unknown name: the closest known one, else the list of all."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(options) or 'none'}"
