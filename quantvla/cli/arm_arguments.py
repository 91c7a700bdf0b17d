"""Arms on the command line: ``NAME=DIRECTORY``, or a directory that gives its own name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantvla.runtime.errors import QuantVLAError

if TYPE_CHECKING:
    from quantvla.evaluate.arms import Arm


def parse_arms(arguments: Sequence[str], *, denoise_steps: int | None = None) -> tuple[Arm, ...]:
    """Return the arms of ``NAME=DIRECTORY`` arguments. Raises `QuantVLAError` for any other form."""
    for argument in arguments:
        name, equals, directory = argument.partition("=")
        if not (name and equals and directory):
            raise QuantVLAError(
                f"arm: expected NAME=DIRECTORY, got {argument!r}; "
                "write for example float=examples/metaworld/policy"
            )
    return parse_named_arms(arguments, denoise_steps=denoise_steps)


def parse_named_arms(
    arguments: Sequence[str], *, denoise_steps: int | None = None
) -> tuple[Arm, ...]:
    """Return the arms of ``NAME=DIRECTORY`` or ``DIRECTORY`` arguments; the latter are named by their last part."""
    import msgspec

    from quantvla.evaluate.arms import identify_arm

    arms = []
    for argument in arguments:
        name, equals, directory = argument.partition("=")
        path = Path(directory if equals else argument)
        arm = identify_arm(name if equals else path.resolve().name, path)
        arms.append(msgspec.structs.replace(arm, denoise_steps=denoise_steps))
    return tuple(arms)
