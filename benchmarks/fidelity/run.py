"""All recipes against the float policy: bytes, action error, distribution, closed loop on two test beds.

    python benchmarks/fidelity/run.py --no-closed-loop          # minutes: quantize, export, compare
    python benchmarks/fidelity/sweep.py                         # once per policy: the harder test bed
    python benchmarks/fidelity/run.py --episodes 34             # 34 episodes of every task, bed and arm
    python benchmarks/fidelity/render.py                        # docs/fidelity.md from the results

Quantizing and exporting are the product's own commands in fresh processes, so that their time and
peak memory are measured. Every finished step is kept (the result files, samples and journals below
--work), and the same command does only what is missing or was made from something else; after a change
of the compiler, --fresh compiles again, and what follows is done again where the bytes differ.

    --only quantize --checkpoint DIR --calib SET --results DIR  # cost of quantize alone, any policy
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import msgspec
from arm_result import REFERENCE, ArmRecord, Compared, read_record, write_record
from beds import REFERENCE_BED, BedSpec, ClosedLoop, read_bed
from compiling import (
    Sources,
    compile_key,
    directory_bytes,
    export_arm,
    float_key,
    measured_size,
    quantize_arm,
)

from quantvla.calib_sets import limit, open_set
from quantvla.cli.progress import progress_bar
from quantvla.evaluate.arms import Arm, identify_arm
from quantvla.evaluate.closed_loop import available_cores
from quantvla.fidelity.compare import Comparison, ComparisonPlan, compare
from quantvla.recipe import bundled_recipes, read_recipe
from quantvla.report.measured import machine_report
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.files import sha256_tree
from quantvla.versions import compiler_versions

HERE = Path(__file__).parent
SIMULATED = ("published",)
"""Recipes without an integer form: they run in torch only."""
SLICED_FROM = 30
"""From so many episodes per task on, a third of them is run for all arms first."""
BEDS = ("hard", "reference")
QUANTIZE, COMPARE, CLOSED_LOOP = STEPS = ("quantize", "compare", "closed-loop")


@dataclass(frozen=True)
class Options:
    """The command line."""

    recipes: tuple[str, ...]
    sources: Sources
    work: Path
    results: Path
    heldout_frames: int
    noises: int
    episodes: int
    hard_bed: Path
    beds: tuple[str, ...]
    tasks: tuple[str, ...] | None
    seed: int
    processes: int
    steps: tuple[str, ...]


class Benchmark:
    """The arms, in order; the float engine is the first, and what all others are compared with."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.records: dict[str, ArmRecord] = {}
        self.arms: dict[str, Arm] = {}

    def compile(self) -> None:
        """Quantize and export every arm whose inputs changed."""
        if self.options.steps != (QUANTIZE,):
            self._compile_float()
        for recipe in self.options.recipes:
            self._compile_recipe(recipe)

    def compare(self) -> None:
        """Sample every arm on the held-out frames and compare it with the float engine."""
        options = self.options
        heldout = limit(
            open_set(options.sources.calibration),
            heldout_frames=options.heldout_frames,
            seed=options.seed,
        ).part("heldout")
        reference, *others = self.arms.values()
        plan = ComparisonPlan(noises=options.noises, seed=options.seed, processes=options.processes)
        with progress_bar() as progress, redirect_stdout(sys.stderr):
            result = compare(
                reference, others, heldout, plan, work=options.work / "samples", progress=progress
            )
        for name in self.arms:
            self._keep(name, compared=_compared(result, name))

    def evaluate(self) -> None:
        """Run the arms in closed loop, a third of the episodes first, so that an early end leaves pairs of all arms."""
        options = self.options
        known = [read_bed(options.hard_bed), REFERENCE_BED]  # the telling one first
        beds = [bed for bed in known if bed.name in options.beds]
        if options.tasks is not None:
            beds = [msgspec.structs.replace(bed, tasks=options.tasks) for bed in beds]
        loop = ClosedLoop(
            options.work / "closed_loop", self.arms[REFERENCE], options.seed, options.processes
        )
        first = options.episodes // 3 if options.episodes >= SLICED_FROM else options.episodes
        for episodes in sorted({first, options.episodes}):
            for bed in beds:
                for name, arm in self.arms.items():
                    self._evaluate_arm(loop, name, arm, bed, episodes)

    def _evaluate_arm(
        self, loop: ClosedLoop, name: str, arm: Arm, bed: BedSpec, episodes: int
    ) -> None:
        print(f"{bed.name} bed, {name}: {episodes} episodes per task", file=sys.stderr)
        found = loop.run(arm, bed, episodes)
        before = self.records[name].beds.get(bed.name)
        if found.episodes_per_minute is None and before is not None:
            found = msgspec.structs.replace(found, episodes_per_minute=before.episodes_per_minute)
        self._keep(name, beds={**self.records[name].beds, bed.name: found})

    def _compile_float(self) -> None:
        options = self.options
        engine = options.work / "engines" / REFERENCE
        key = float_key(options.sources.source_sha256)
        export_arm(options.sources.checkpoint, engine, key)
        self.arms[REFERENCE] = identify_arm(REFERENCE, engine)
        self._start(REFERENCE, REFERENCE, key, simulated=False)
        self._keep(REFERENCE, engine_bytes=directory_bytes(engine))

    def _compile_recipe(self, recipe: str) -> None:
        options = self.options
        name, simulated = Path(recipe).stem, recipe in SIMULATED
        quantized, engine = options.work / "quantized" / name, options.work / "engines" / name
        key = compile_key(options.sources, recipe)
        self._start(name, recipe, key, simulated=simulated)
        cost = quantize_arm(options.sources, recipe, quantized, key)
        if cost is not None:
            self._keep(name, quantize=cost)
        self._keep(name, size=measured_size(quantized))
        if options.steps == (QUANTIZE,):
            return
        if simulated:
            self.arms[name] = identify_arm(name, quantized)
            return
        export_arm(quantized, engine, key)
        self.arms[name] = identify_arm(name, engine)
        self._keep(name, engine_bytes=directory_bytes(engine))

    def _start(self, name: str, recipe: str, key: str, *, simulated: bool) -> None:
        """Take up the arm's file; one that was made from something else is started anew."""
        found = read_record(self.options.results, name)
        if found is None or found.compile_key != key:
            found = ArmRecord(
                arm=name, recipe=recipe, simulated=simulated, compile_key=key,
                source_sha256=self.options.sources.source_sha256, versions=compiler_versions(),
                machine=machine_report(self.options.processes).processor,
            )  # fmt: skip
        self.records[name] = found

    def _keep(self, name: str, **changes: object) -> None:
        """Change the arm's file as it is now: another run may have added to it."""
        found, ours = read_record(self.options.results, name), self.records[name]
        current = found if found is not None and found.compile_key == ours.compile_key else ours
        self.records[name] = msgspec.structs.replace(current, **changes)
        write_record(self.options.results, self.records[name])


def _compared(result: Comparison, name: str) -> Compared:
    return Compared(
        frames=result.frames,
        noises=result.noises,
        seed=result.seed,
        set_sha256=result.set_sha256,
        reference_sha256=result.reference.sha256,
        dimensions=result.dimensions,
        reference_smoothness=result.reference.smoothness,
        result=result.arms.get(name),
    )


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Return the options; unknown recipes are refused before anything runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arms", help="recipes (names or .toml files), separated by commas [all bundled]"
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("examples/metaworld/policy"))
    parser.add_argument("--calib", type=Path, default=Path("calib_sets/metaworld"))
    parser.add_argument("--frames", type=int, default=256, help="calibration frames")
    parser.add_argument("--heldout-frames", type=int, default=64)
    parser.add_argument("--noises", type=int, default=32, help="chunks per held-out frame")
    parser.add_argument("--episodes", type=int, default=34, help="per task, arm and bed (9 tasks)")
    parser.add_argument("--no-closed-loop", action="store_true")
    parser.add_argument(
        "--only", choices=STEPS, help="that step alone (arms are compiled where they are not yet)"
    )
    parser.add_argument("--hard-bed", type=Path, default=HERE / "hard_bed.json")
    parser.add_argument("--beds", nargs="+", choices=BEDS, default=BEDS)
    parser.add_argument("--tasks", nargs="+", help="closed loop on these tasks [the beds']")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=available_cores())
    parser.add_argument("--work", type=Path, default=Path("build/fidelity"))
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="compile every arm again (after a change of the compiler)",
    )
    parser.add_argument("--results", type=Path, default=HERE / "results")
    found = parser.parse_args(arguments)
    if found.fresh:
        for stamp in found.work.glob("*/*.key"):
            stamp.unlink()
    recipes = tuple(found.arms.split(",")) if found.arms else bundled_recipes()
    for recipe in recipes:
        read_recipe(recipe)
    return Options(
        recipes=recipes,
        sources=Sources(found.checkpoint, found.calib, found.frames, sha256_tree(found.checkpoint)),
        work=found.work, results=found.results, heldout_frames=found.heldout_frames,
        noises=found.noises, episodes=found.episodes, hard_bed=found.hard_bed,
        beds=tuple(found.beds), tasks=tuple(found.tasks) if found.tasks else None, seed=found.seed,
        processes=found.processes,
        steps=_steps(found.only, closed_loop=not found.no_closed_loop),
    )  # fmt: skip


def _steps(only: str | None, *, closed_loop: bool) -> tuple[str, ...]:
    if only is not None:
        return (only,)
    return STEPS if closed_loop else (QUANTIZE, COMPARE)


def main() -> None:
    """Run the steps in order."""
    options = parse_options()
    benchmark = Benchmark(options)
    benchmark.compile()
    if COMPARE in options.steps:
        benchmark.compare()
    if CLOSED_LOOP in options.steps:
        benchmark.evaluate()


if __name__ == "__main__":
    try:
        main()
    except QuantVLAError as error:
        sys.exit(f"error: {error}")
