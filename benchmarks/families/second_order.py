"""GPTQ of one linear at the released widths: time and memory of what `gptq-w4a8` does after a sweep over the set.

    python -m benchmarks.families.second_order

Random weights under moments of correlated random inputs, twice as many rows as channels. Each shape is a process of its own; memory is
what it allocates (``RssAnon``), sampled, with the moments of one input and without the policy. Writes ``benchmarks/families/second_order.json``.
"""

from __future__ import annotations

from pathlib import Path

import click
import msgspec
import torch

from benchmarks.families.full_size import Step, measured
from quantvla.runtime.files import write_atomic
from quantvla.runtime.machine import physical_cores
from quantvla.schemes import resolve_scheme
from quantvla.second_order import SecondOrder, corrected_target, round_second_order
from quantvla.statistics import InputMoments

MODULE = "benchmarks.families.second_order"
RESULT = Path(__file__).parent / "second_order.json"
SHAPES = {
    "pi05 language model, gate and up": (16384, 2048),
    "pi05 language model, down": (2048, 16384),
    "pi05 action head, down": (1024, 4096),
    "groot language model, down": (2048, 6144),
    "groot action head, net.2": (1536, 6144),
}
"""(out, in) of the linears that take longest."""


@click.group(invoke_without_command=True)
@click.pass_context
def main(context: click.Context) -> None:
    """Measure all shapes and keep the result."""
    if context.invoked_subcommand is not None:
        return
    found: dict[str, Step] = {}
    for name, (rows, columns) in SHAPES.items():
        click.echo(f"{name}: {rows} x {columns}")
        found[name] = measured(MODULE, "one", rows, columns)
    write_atomic(RESULT, msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")


@main.command()
@click.argument("rows", type=int)
@click.argument("columns", type=int)
def one(rows: int, columns: int) -> None:
    """Round one weight."""
    torch.set_num_threads(physical_cores())
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    moments = InputMoments.empty(columns)
    for _ in range(4):
        teacher = torch.randn(columns // 2, columns, generator=generator)
        teacher += teacher.roll(1, 1)
        student = teacher + 0.05 * torch.randn(teacher.shape, generator=generator)
        moments.add_(student, teacher)
    target = corrected_target(weight, moments.student, moments.cross, 0.01)
    scheme = resolve_scheme("w4a8", (32,), site="one", in_features=columns)
    round_second_order(target, moments.student, scheme, SecondOrder(dynamic=True))


if __name__ == "__main__":
    main()
