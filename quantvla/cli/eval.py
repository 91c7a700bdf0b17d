"""``quantvla eval``: closed-loop success of checkpoints and engines on the same episodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
from rich.console import Console
from rich.table import Table

from quantvla.cli.arm_arguments import parse_arms
from quantvla.runtime.errors import explain

if TYPE_CHECKING:
    from quantvla.evaluate.arms import Arm
    from quantvla.evaluate.environment import Simulator
    from quantvla.evaluate.results import Evaluation

RESULT_FILE = "evaluation.json"
FILM_FILE = "film.gif"
FILM_TASKS = 4


@click.command("eval")
@click.argument("arms", nargs=-1, required=True, metavar="NAME=DIRECTORY...")
@click.option("--tasks", default="all", show_default=True, help="Task names, separated by commas.")
@click.option("--episodes", default=20, show_default=True, help="Episodes per task.")
@click.option("--seed", default=0, show_default=True, help="Which goals and flow noise (0 to 99).")
@click.option("--execute", type=int, help="Actions run of each chunk [default: the policy's].")
@click.option("--steps", type=int, help="Denoise steps [default: the policy's].")
@click.option(
    "--perturb",
    multiple=True,
    metavar="NAME=VALUE",
    help="Make the tasks harder: camera (metres), light, goals (shares), actions (deviation). Repeatable.",
)
@click.option("--processes", type=click.IntRange(min=1), help="Workers [default: all cores].")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory for the result and the journal; the same command again resumes.",
)
@click.option("--film", is_flag=True, help=f"Also write {FILM_FILE}, arms side by side (needs -o).")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def evaluate(
    arms: Sequence[str],
    tasks: str,
    episodes: int,
    seed: int,
    execute: int | None,
    steps: int | None,
    perturb: Sequence[str],
    processes: int | None,
    output: Path | None,
    film: bool,
    as_json: bool,
) -> None:
    """Run policies in closed loop in Meta-World and compare their success.

    Each arm is a LeRobot checkpoint or an engine directory with a name of your choice. All arms
    get the same goals and the same flow noise, so that they differ by the policy alone:

        quantvla eval float=CHECKPOINT_DIR w4a8=ENGINE_DIR --episodes 20 -o build/eval
    """
    from quantvla.evaluate import closed_loop
    from quantvla.evaluate.environment import MetaWorld
    from quantvla.evaluate.perturbation import parse_perturbation
    from quantvla.runtime.files import write_atomic

    if film and output is None:
        raise explain("--film", "has no place to go", remedy="give an output directory with -o")
    named = parse_arms(arms)
    simulator = MetaWorld(parse_perturbation(perturb))
    plan = closed_loop.EvaluationPlan(tuple(tasks.split(",")), episodes, seed, execute, steps)
    journal = None if output is None else output / closed_loop.JOURNAL_FILE
    result = closed_loop.evaluate(
        named, plan, processes=processes, journal=journal, simulator=simulator
    )
    encoded = msgspec.json.format(msgspec.json.encode(result), indent=2)
    if output is not None:
        write_atomic(output / RESULT_FILE, encoded + b"\n")
        if film:
            _write_film(named, result, output / FILM_FILE, simulator)
    if as_json:
        click.echo(encoded.decode())
    else:
        print_evaluation(result, Console())


def print_evaluation(result: Evaluation, console: Console) -> None:
    """Print success per task and arm with Wilson's interval, and what each pair of arms differs by."""
    from quantvla.report.table import format_rate

    table = Table(
        title=f"Success, {result.episodes_per_task} episodes per task, seed {result.seed}"
    )
    table.add_column("task")
    for name in result.arms:
        table.add_column(name, justify="right")
    for task in result.tasks:
        table.add_row(task, *(format_rate(arm.tasks[task]) for arm in result.arms.values()))
    table.add_section()
    table.add_row("all", *(format_rate(arm) for arm in result.arms.values()), style="bold")
    console.print(table)
    if result.perturbation or result.denoise_steps is not None:
        changes = [f"{name} {value:g}" for name, value in result.perturbation.items()]
        if result.denoise_steps is not None:
            changes.append(f"{result.denoise_steps} denoise steps")
        console.print(f"The tasks are changed: {', '.join(changes)}")
    if result.pairs:
        console.print(_pair_table(result))
    if not result.shared_noise:
        console.print(
            "The arms draw noise of different shapes: goals are shared, flow noise is not."
        )


def _pair_table(result: Evaluation) -> Table:
    table = Table(title="Pairs on the same episodes and noise; p is McNemar's exact test")
    table.add_column("b - a", no_wrap=True)
    for name in ("points", "95 %", "both", "only a", "only b", "neither", "p"):
        table.add_column(name, justify="right", no_wrap=name == "95 %")
    for pair in result.pairs:
        low, high = pair.ci95
        table.add_row(
            f"{pair.b} - {pair.a}",
            f"{100 * pair.difference:+.1f}",
            f"{100 * low:+.1f} {100 * high:+.1f}",
            *map(str, (pair.both, pair.only_a, pair.only_b, pair.neither)),
            f"{pair.mcnemar_p:.3f}",
        )
    return table


def _write_film(arms: Sequence[Arm], result: Evaluation, path: Path, simulator: Simulator) -> None:
    from quantvla.evaluate.rollouts import record_rollouts
    from quantvla.report.film import write_film

    console = Console(stderr=True)
    tasks = result.tasks[:FILM_TASKS]
    with console.status(f"filming {', '.join(tasks)}"):
        write_film(tuple(record_rollouts(arms, tasks, seed=result.seed, simulator=simulator)), path)
    console.print(f"film: {path}")
