"""``quantvla plan``: which site gets which scheme, before any weight is touched."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from quantvla.checkpoint import is_quantized, read_card
from quantvla.cli import options
from quantvla.cli.mixed import Budgets, budget_options, plan_mixed
from quantvla.cli.passes import print_passes
from quantvla.cli.target_options import GpuOptions, gpu_options, plan_for_gpu, refuse_gpu_options
from quantvla.export.source import load_source
from quantvla.families import load_policy
from quantvla.layout import make_plan
from quantvla.passes.base import PassReport
from quantvla.plan import Plan
from quantvla.recipe import read_recipe
from quantvla.runtime.errors import explain
from quantvla.target_plan import TargetPlan


@click.command()
@options.policy_path
@options.recipe
@click.option(
    "--target", help="Say what runs in which format there (jetson-orin, jetson-thor, rtx)."
)
@gpu_options
@budget_options
@options.as_json
def plan(
    policy_path: Path, recipe: str, target: str | None, board: str | None, activations: str,
    precision: str, embedding: str, as_json: bool, budget: Budgets,
) -> None:  # fmt: skip
    """Print the plan of a recipe for a policy: site, stage, shape, scheme, bytes, reason.

    Of a quantized checkpoint, print the plan that it was made by and what its passes did. With a
    budget, choose the format of each of the recipe's integer sites: least error of the action within
    the budget, see docs/mixed_precision.md.
    """
    if target is None:
        refuse_gpu_options("no --target")
    if budget.given:
        if target is not None:
            raise explain(
                "quantvla plan", "a budget's formats are those of target cpu", got=f"--target {target}",
                remedy="plan without --target, or without a budget",
            )  # fmt: skip
        plan_mixed(policy_path, read_recipe(recipe), budget, as_json=as_json)
        return
    if target is not None:
        source = load_source(policy_path)
        chosen = GpuOptions(target, board, activations, precision, embedding)
        scheme = source.plan or make_plan(source.loaded.sites, read_recipe(recipe))
        on_target = plan_for_gpu(source.loaded, scheme, chosen)
        if as_json:
            click.echo(msgspec.json.format(msgspec.json.encode(on_target), indent=1))
        else:
            print_target_plan(on_target)
        return
    reports: tuple[PassReport, ...] = ()
    if is_quantized(policy_path):
        card = read_card(policy_path)
        made, reports = card.plan, card.reports
    else:
        made = make_plan(load_policy(policy_path).sites, read_recipe(recipe))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(made), indent=1))
    else:
        print_plan(made)
        print_passes(reports, Console())


def print_plan(made: Plan) -> None:
    """Print every site and the totals per stage; bytes are of weights, float counted in half precision."""
    console = Console(width=None if Console().is_terminal else 200)
    table = Table(title=f"plan: {made.recipe}")
    for column, justify in (
        ("site", "left"), ("stage", "left"), ("out x in", "right"), ("scheme", "left"),
        ("fp16 bytes", "right"), ("bytes", "right"), ("reason", "left"),
    ):  # fmt: skip
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for entry in made.entries:
        scheme = entry.scheme.name + (f" block {entry.scheme.block}" if entry.quantized else "")
        table.add_row(
            entry.site, entry.stage, f"{entry.out_features} x {entry.in_features}", scheme,
            f"{entry.bytes_before:,}", f"{entry.bytes_after:,}", entry.reason,
        )  # fmt: skip
    console.print(table)
    console.print(plan_summary(made))


def plan_summary(made: Plan) -> str:
    """Return one line on what is quantized and what that saves."""
    before = sum(entry.bytes_before for entry in made.quantized)
    after = sum(entry.bytes_after for entry in made.quantized)
    return (
        f"{len(made.quantized)} of {len(made.entries)} linears become integers: "
        f"{before / 2**20:.2f} MiB in half precision -> {after / 2**20:.2f} MiB with scales "
        f"({made.saving():.1%} less); {len(made.dropped)} dropped because inference never reads them"
    )


def print_target_plan(made: TargetPlan) -> None:
    """Print every site with its format on the board, the totals per stage, and what does not get its scheme."""
    console = Console(width=None if Console().is_terminal else 200)
    table = Table(
        title=f"{made.target}, {made.board}, {made.library}, {made.activations} between linears"
    )
    for column in ("site", "stage", "tokens", "scheme", "runs in", "fp16 bytes", "bytes", "reason"):
        table.add_column(column, overflow="fold")
    for entry in made.entries:
        table.add_row(
            entry.site, entry.stage, str(entry.tokens), entry.scheme, entry.format,
            f"{entry.half_bytes:,}", f"{entry.weight_bytes:,}", entry.reason,
        )  # fmt: skip
    console.print(table)
    console.print(f"token embedding in {made.embedding}")
    for stage in dict.fromkeys(entry.stage for entry in made.entries):
        entries = [entry for entry in made.entries if entry.stage == stage]
        formats = Counter(entry.format for entry in entries)
        console.print(
            f"{stage}: {', '.join(f'{n} {name}' for name, n in formats.items())}; weights "
            f"{sum(e.half_bytes for e in entries) / 2**20:.2f} MiB in half precision -> "
            f"{sum(e.weight_bytes for e in entries) / 2**20:.2f} MiB"
        )
    for entry in made.refused:
        console.print(f"[yellow]not as planned[/] {entry.site}: {entry.reason}")
