"""`quantize` of a full-size policy, killed and started again, against the run that was left alone: the same bytes?

    python -m benchmarks.families.full_size run build/full_size/groot --recipe w4a8-fast
    python -m benchmarks.families.resume build/full_size/groot --recipe w4a8-fast \
        --kill-at "calibrating: 2/" --kill-at "rounding weights: 208/"

Every start is a process of its own, and is killed when its progress says what ``--kill-at`` says; SIGKILL leaves it no
time for anything. Adds to ``benchmarks/families/resume.json``.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import click
import msgspec

from quantvla.families import policy_type
from quantvla.runtime.files import sha256_tree, write_atomic

RESULT = Path(__file__).parent / "resume.json"


class Resumed(msgspec.Struct, frozen=True):
    """``seconds`` of every start, all but the last one killed at ``kills``; ``same_bytes``: as the run left alone."""

    policy: str
    recipe: str
    kills: tuple[str, ...]
    seconds: list[float]
    same_bytes: bool


def started(command: list[object], kill: str | None) -> bool:
    """Run a command until it ends or its progress begins with ``kill``; return whether it was killed."""
    with subprocess.Popen(
        [str(part) for part in command], stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stderr is not None
        for line in child.stderr:
            click.echo(line, err=True, nl=False)
            if kill is not None and line.startswith(kill):
                child.kill()
                return True
    if child.returncode:
        sys.exit(child.returncode)
    return False


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option("--recipe", default="w4a8-fast", show_default=True)
@click.option("--kill-at", "kills", multiple=True, help="Beginning of a line of progress.")
def main(checkpoint: Path, recipe: str, kills: tuple[str, ...]) -> None:
    """Kill, continue, compare."""
    whole = checkpoint.with_name(f"{checkpoint.name}-{recipe}") / "checkpoint"
    output = checkpoint.with_name(f"{checkpoint.name}-{recipe}-resumed") / "checkpoint"
    shutil.rmtree(output.parent, ignore_errors=True)
    module = "benchmarks.families.full_size"
    command = [sys.executable, "-m", module, "quantize", checkpoint, output, "--recipe", recipe]
    seconds = []
    for kill in (*kills, None):
        begin = time.monotonic()
        killed = started(command, kill)
        seconds.append(round(time.monotonic() - begin, 1))
        assert killed == (kill is not None), f"it ended before it said {kill!r}"
        assert killed != output.exists()
    found = Resumed(
        policy_type(checkpoint), recipe, kills, seconds, sha256_tree(output) == sha256_tree(whole)
    )
    click.echo(msgspec.json.format(msgspec.json.encode(found), indent=1).decode())
    kept = msgspec.json.decode(RESULT.read_bytes(), type=list[Resumed]) if RESULT.is_file() else []
    kept = [r for r in kept if (r.policy, r.recipe) != (found.policy, recipe)] + [found]
    write_atomic(RESULT, msgspec.json.format(msgspec.json.encode(kept), indent=1) + b"\n")
    sys.exit(0 if found.same_bytes else 1)


if __name__ == "__main__":
    main()
