"""The steps of the demo: each calls the function behind the command line that it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from quantvla.calib_sets import CalibrationSet, limit, open_set
from quantvla.cli.progress import progress_bar
from quantvla.evaluate.arms import Arm, identify_arm
from quantvla.evaluate.closed_loop import JOURNAL_FILE, EvaluationPlan, available_cores, evaluate
from quantvla.evaluate.environment import ALL_TASKS, MetaWorld, Simulator
from quantvla.evaluate.policy_bench import PolicyBenchReport, bench_policy
from quantvla.evaluate.results import Evaluation
from quantvla.evaluate.rollouts import record_rollouts
from quantvla.export.engine import export_engine
from quantvla.quantize import quantize
from quantvla.recipe import read_recipe
from quantvla.report.examples import chunk_examples
from quantvla.report.film import write_film
from quantvla.report.measured import Benches
from quantvla.report.structure import ChunkExample
from quantvla.runtime.bench import BenchReport, bench
from quantvla.runtime.files import sha256_tree, write_atomic
from quantvla.steps import FinishedStep, Step, StepRunner
from quantvla.verify import verify
from quantvla.verify_report import VerifyReport

STEPS = 9
RECIPE = "w4a8"
TARGET = "cpu"
FILM_TASKS = ("pick-place-v3", "drawer-open-v3", "door-open-v3", "button-press-topdown-v3")
EXAMPLES = 4
BENCH_ROUNDS, BENCH_REPEATS, BENCH_WARMUP = 3, 30, 5


@dataclass(frozen=True)
class DemoPlan:
    """What the demo runs on: a LeRobot checkpoint, its calibration set, and how much of each step."""

    checkpoint: Path
    calibration: Path
    directory: Path
    frames: int = 128
    heldout_frames: int = 32
    episodes: int = 10
    processes: int | None = None
    seed: int = 0
    tasks: tuple[str, ...] = (ALL_TASKS,)
    film_tasks: tuple[str, ...] = FILM_TASKS
    bench_rounds: int = BENCH_ROUNDS
    bench_repeats: int = BENCH_REPEATS
    simulator: Simulator = field(default_factory=MetaWorld)


class Demo:
    """The steps, in order. Each method runs one and returns what is needed of it."""

    def __init__(self, plan: DemoPlan) -> None:
        """Open the inputs; nothing runs yet."""
        self.plan = plan
        self.steps = StepRunner(plan.directory, STEPS)
        self.set = limit(
            open_set(plan.calibration),
            frames=plan.frames,
            heldout_frames=plan.heldout_frames,
            seed=plan.seed,
        )
        self.source = sha256_tree(plan.checkpoint)
        self.quantized = plan.directory / "quantized"
        self.engines = {name: plan.directory / "engines" / name for name in ("float", "w4a8")}

    @property
    def heldout(self) -> CalibrationSet:
        """The frames that calibration never sees."""
        return self.set.part("heldout")

    def quantize(self) -> FinishedStep:
        """Plan, calibrate and quantize."""
        plan = self.plan
        calibration = self.set.part("calibration")
        step = Step(
            name="quantize",
            title="plan, calibrate and quantize",
            command=f"quantvla quantize --policy.path {plan.checkpoint} --calib {plan.calibration} "
            f"--frames {plan.frames} --recipe {RECIPE} -o {self.quantized}",
            output=self.quantized,
            inputs=(self.source, calibration.checksum, RECIPE, str(plan.seed)),
            work=(self.quantized.with_name(self.quantized.name + ".work"),),
        )

        def make() -> None:
            with progress_bar() as progress:
                quantize(
                    plan.checkpoint,
                    calibration,
                    read_recipe(RECIPE),
                    self.quantized,
                    seed=plan.seed,
                    progress=progress,
                )

        return self.steps.run(step, make)

    def export(self, name: str, checkpoint: Path, digest: str) -> FinishedStep:
        """Export the float or the quantized checkpoint."""
        output = self.engines[name]
        step = Step(
            name=f"export {name}",
            title=f"export the {name} engine",
            command=f"quantvla export {checkpoint} --target {TARGET} -o {output}",
            output=output,
            inputs=(digest, TARGET),
        )

        def make() -> None:
            with progress_bar() as progress:
                export_engine(checkpoint, TARGET, output, progress=progress)

        return self.steps.run(step, make)

    def verify(self, name: str, digests: Sequence[str]) -> VerifyReport:
        """Compare an engine with the float policy on held-out frames."""
        plan = self.plan
        output = plan.directory / f"verify-{name}.json"
        quantized = None if name == "float" else self.quantized
        option = "" if quantized is None else f"--quantized {quantized} "
        step = Step(
            name=f"verify {name}",
            title=f"verify the {name} engine",
            command=f"quantvla verify {self.engines[name]} --policy.path {plan.checkpoint} "
            f"--calib {plan.calibration} --frames {plan.heldout_frames} {option}--json",
            output=output,
            inputs=(self.source, self.heldout.checksum, str(plan.seed), *digests),
        )

        def make() -> None:
            with progress_bar() as progress:
                report = verify(
                    self.engines[name],
                    plan.checkpoint,
                    self.heldout,
                    float_engine=self.engines["float"],
                    quantized=quantized,
                    seed=plan.seed,
                    progress=progress,
                )
            write_json(output, report)

        self.steps.run(step, make)
        return msgspec.json.decode(output.read_bytes(), type=VerifyReport)

    def bench(self, digests: Sequence[str]) -> Benches:
        """Measure all arms in turns, each in a fresh process."""
        output = self.plan.directory / "bench.json"
        step = Step(
            name="bench",
            title="measure latency and memory of all arms, in turns",
            command="; ".join(f"quantvla bench {path} --json" for path in self.engines.values())
            + f"; python -m quantvla.evaluate.policy_bench {self.plan.checkpoint} "
            f"{self.plan.bench_repeats} {BENCH_WARMUP} {available_cores()}",
            output=output,
            inputs=(
                self.source,
                *digests,
                str(self.plan.bench_rounds),
                str(self.plan.bench_repeats),
            ),
        )
        self.steps.run(step, lambda: write_json(output, self._bench()))
        return msgspec.json.decode(output.read_bytes(), type=Benches)

    def _bench(self) -> Benches:
        policies: list[PolicyBenchReport] = []
        engines: dict[str, list[BenchReport]] = {name: [] for name in self.engines}
        with progress_bar() as progress:
            for index in range(self.plan.bench_rounds):
                progress("measuring", index, self.plan.bench_rounds)
                for name, path in self.engines.items():
                    engines[name].append(
                        bench(path, repeats=self.plan.bench_repeats, warmup=BENCH_WARMUP)
                    )
                policies.append(
                    bench_policy(
                        self.plan.checkpoint, repeats=self.plan.bench_repeats, warmup=BENCH_WARMUP
                    )
                )
            progress("measuring", self.plan.bench_rounds, self.plan.bench_rounds)
        return Benches(
            policy=tuple(policies),
            engines={name: tuple(rounds) for name, rounds in engines.items()},
        )

    def evaluate(self, digests: Sequence[str]) -> Evaluation:
        """Run all arms in closed loop on the same episodes."""
        plan = self.plan
        directory = plan.directory / "eval"
        output = directory / "evaluation.json"
        arms = " ".join(f"{arm.name}={arm.path}" for arm in self.arms())
        work_inputs = (self.source, *digests, str(plan.seed))
        step = Step(
            name="eval",
            title=f"closed loop, {plan.episodes} episodes of every task, all arms",
            command=f"quantvla eval {arms} --episodes {plan.episodes} --seed {plan.seed} "
            f"-o {directory}",
            output=output,
            inputs=(*work_inputs, str(plan.episodes), *plan.tasks),
            work=(directory / JOURNAL_FILE,),
            work_inputs=work_inputs,
        )

        def make() -> None:
            result = evaluate(
                self.arms(),
                EvaluationPlan(plan.tasks, plan.episodes, plan.seed),
                processes=plan.processes,
                journal=directory / JOURNAL_FILE,
                simulator=plan.simulator,
            )
            write_json(output, result)

        self.steps.run(step, make)
        return msgspec.json.decode(output.read_bytes(), type=Evaluation)

    def examples(self, digests: Sequence[str]) -> tuple[ChunkExample, ...]:
        """Predict the same chunks with every arm."""
        plan = self.plan
        output = plan.directory / "chunks.json"
        step = Step(
            name="chunks",
            title=f"action chunks of {EXAMPLES} held-out observations",
            command="Policy.from_pretrained(ENGINE).predict_action_chunk(obs, noise=noise)",
            output=output,
            inputs=(self.source, self.heldout.checksum, *digests),
        )

        def make() -> None:
            found = chunk_examples(
                plan.checkpoint, self.engines, self.heldout, count=EXAMPLES, seed=plan.seed
            )
            write_json(output, found)

        self.steps.run(step, make)
        return msgspec.json.decode(output.read_bytes(), type=tuple[ChunkExample, ...])

    def film(self, digests: Sequence[str]) -> Path:
        """Film the float policy and the W4A8 engine side by side."""
        output = self.plan.directory / "film.gif"
        tasks = self.plan.film_tasks
        arms = [arm for arm in self.arms() if arm.name != "float"]
        named = " ".join(f"{arm.name}={arm.path}" for arm in arms)
        step = Step(
            name="film",
            title="film of the float policy and the W4A8 engine",
            command=f"quantvla eval {named} --tasks {','.join(tasks)} --film -o DIRECTORY",
            output=output,
            inputs=(self.source, *digests, str(self.plan.seed), *tasks),
        )

        def make() -> None:
            with progress_bar() as progress:
                rollouts = []
                total = len(tasks) * len(arms)
                for rollout in record_rollouts(
                    arms, tasks, seed=self.plan.seed, simulator=self.plan.simulator
                ):
                    rollouts.append(rollout)
                    progress("filming", len(rollouts), total)
            write_film(rollouts, output)

        self.steps.run(step, make)
        return output

    def arms(self) -> tuple[Arm, ...]:
        """Return the float policy and both engines."""
        return (
            identify_arm("float_policy", self.plan.checkpoint),
            *(identify_arm(name, path) for name, path in self.engines.items()),
        )


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_atomic(path, msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")
