"""`quantize` of a full-size policy, killed and started again, against the run that was left alone: the same bytes?

    python -m benchmarks.families.full_size run build/full_size/groot --recipe w4a8-fast
    python -m benchmarks.families.resume build/full_size/groot --recipe w4a8-fast --kill-after 170 --kill-after 45

Every start is a process of its own; SIGKILL leaves it no time for anything. Adds to ``benchmarks/families/resume.json``.
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
    """``seconds`` of every start, all but the last one killed then; ``same_bytes``: as the run left alone."""

    policy: str
    recipe: str
    seconds: list[float]
    same_bytes: bool


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option("--recipe", default="w4a8-fast", show_default=True)
@click.option("--kill-after", "kills", type=float, multiple=True, help="Seconds after a start.")
def main(checkpoint: Path, recipe: str, kills: tuple[float, ...]) -> None:
    """Kill, continue, compare."""
    whole = checkpoint.with_name(f"{checkpoint.name}-{recipe}") / "checkpoint"
    output = checkpoint.with_name(f"{checkpoint.name}-{recipe}-resumed") / "checkpoint"
    shutil.rmtree(output.parent, ignore_errors=True)
    module = "benchmarks.families.full_size"
    command = [sys.executable, "-m", module, "quantize", checkpoint, output, "--recipe", recipe]
    seconds = []
    for limit in (*kills, None):
        begin = time.monotonic()
        child = subprocess.Popen(command)
        try:
            status = child.wait(timeout=limit)
            assert limit is None, "it ended before it was killed: choose less time"
            assert status == 0, status
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            assert not output.exists()
        seconds.append(round(time.monotonic() - begin, 1))
    found = Resumed(
        policy_type(checkpoint), recipe, seconds, sha256_tree(output) == sha256_tree(whole)
    )
    click.echo(msgspec.json.format(msgspec.json.encode(found), indent=1).decode())
    kept = msgspec.json.decode(RESULT.read_bytes(), type=list[Resumed]) if RESULT.is_file() else []
    kept = [r for r in kept if (r.policy, r.recipe) != (found.policy, recipe)] + [found]
    write_atomic(RESULT, msgspec.json.format(msgspec.json.encode(kept), indent=1) + b"\n")
    sys.exit(0 if found.same_bytes else 1)


if __name__ == "__main__":
    main()
