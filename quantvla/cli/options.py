"""Options and argument types that several commands share."""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource

DIRECTORY = click.Path(path_type=Path)

policy_path = click.option(
    "--policy.path",
    "policy_path",
    type=DIRECTORY,
    required=True,
    help="LeRobot checkpoint directory.",
)
output = click.option("-o", "--output", type=DIRECTORY, required=True, help="Directory to write.")
overwrite = click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
recipe = click.option(
    "--recipe",
    default="w4a8",
    show_default=True,
    help="Name of a bundled recipe or path of a .toml file.",
)
as_json = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object and nothing else."
)
seed = click.option("--seed", default=0, show_default=True, help="Seed of the flow noise.")
threads = click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Threads of the engine.  [default: one per physical core]",
)
cache = click.option(
    "--cache",
    type=DIRECTORY,
    help="Where measurements are kept.  [default: $QUANTVLA_CACHE, else ~/.cache/quantvla]",
)


def is_given(name: str) -> bool:
    """Return whether the running command's option was written on the command line, whatever its value."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE
