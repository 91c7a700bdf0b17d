"""The fidelity benchmark on tiny engines and a fake simulator: what is kept, what is not done again, the page."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "fidelity"
MODULES = (
    "arm_result",
    "beds",
    "compiling",
    "fidelity_figures",
    "render",
    "run",
    "sweep",
    "tables",
)
sys.path.insert(0, str(ROOT / "tests" / "evaluate"))

from fake_simulator import FakeSimulator, arm, load  # noqa: E402

from quantvla.evaluate import closed_loop  # noqa: E402
from quantvla.evaluate.results import TaskResult  # noqa: E402
from quantvla.fidelity import recording  # noqa: E402
from quantvla.recipe import bundled_recipes  # noqa: E402
from quantvla.runtime.errors import QuantVLAError  # noqa: E402


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The benchmark's modules, imported from its folder and forgotten afterwards."""
    import importlib

    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture
def commands(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tiny_quantized: Path,
    tiny_float_engine: Path, tiny_integer_engine: Path,
) -> list[str]:  # fmt: skip
    """The commands that the benchmark runs; each copies what the real one would write."""
    ran: list[str] = []

    def run(*arguments: str) -> Any:
        ran.append(arguments[0])
        source = tiny_quantized
        if arguments[0] == "export":
            source = tiny_integer_engine if "quantized" in arguments[1] else tiny_float_engine
        output = Path(arguments[arguments.index("-o") + 1])
        shutil.copytree(source, output, dirs_exist_ok=True)
        command = " ".join(arguments)
        return scripts["arm_result"].Cost(command=command, wall_s=2, cpu_s=1, peak_rss_gib=0.5)

    monkeypatch.setattr(scripts["compiling"], "run_command", run)
    return ran


@pytest.fixture
def arguments(tmp_path: Path, tiny_checkpoint: Path, tiny_set: Path) -> list[str]:
    return [
        "--arms", "w4a8", "--checkpoint", str(tiny_checkpoint), "--calib", str(tiny_set),
        "--noises", "8", "--heldout-frames", "2", "--processes", "1", "--work",
        str(tmp_path / "work"), "--results", str(tmp_path / "results"),
    ]  # fmt: skip


def test_finished_steps_are_not_done_again(
    scripts: dict[str, ModuleType], commands: list[str], arguments: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def run(*more: str) -> None:
        benchmark = scripts["run"].Benchmark(scripts["run"].parse_options([*arguments, *more]))
        benchmark.compile()
        benchmark.compare()

    run()
    assert commands == ["export", "quantize", "export"]
    first = json.loads((tmp_path / "results" / "w4a8.json").read_text())
    assert first["quantize"]["wall_s"] == 2 and first["size"]["quantized_sites"] > 0
    assert 4 < first["size"]["effective_bits"] < 6 and first["engine_bytes"] > 0
    assert 0 < first["compared"]["result"]["error"]["nrmse"] < 1
    reference = json.loads((tmp_path / "results" / "float.json").read_text())
    assert reference["size"] is None and reference["compared"]["result"] is None

    drawn: list[object] = []
    monkeypatch.setattr(recording, "draw", lambda *given: drawn.append(given))
    commands.clear()
    run()
    assert not commands and not drawn
    assert json.loads((tmp_path / "results" / "w4a8.json").read_text()) == first
    monkeypatch.undo()


def test_other_calibration_frames_are_another_arm(
    scripts: dict[str, ModuleType], commands: list[str], arguments: list[str]
) -> None:
    for frames in ("4", "4", "6"):
        options = scripts["run"].parse_options([*arguments, "--frames", frames])
        scripts["run"].Benchmark(options).compile()
    assert commands == ["export", "quantize", "export", "quantize", "export"]


def test_unknown_recipes_are_refused_before_anything_runs(
    scripts: dict[str, ModuleType], arguments: list[str]
) -> None:
    with pytest.raises(QuantVLAError, match="recipe 'w4a9': unknown; did you mean 'w4a8'"):
        scripts["run"].parse_options([*arguments, "--arms", "w4a9"])


@pytest.fixture
def fake_loop(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Any:
    """A `ClosedLoop` in the fake simulator, with the arm ``good`` as the reference."""

    def evaluate(arms: Any, plan: Any, *, simulator: Any, processes: Any, journal: Path) -> Any:
        return closed_loop.evaluate(
            arms, plan, processes=1, journal=journal, load=load, progress=False,
            simulator=FakeSimulator(perturbation=simulator.perturbation),
        )  # fmt: skip

    for name in ("beds", "sweep"):
        monkeypatch.setattr(scripts[name], "evaluate", evaluate)
    return scripts["beds"].ClosedLoop(tmp_path, arm("good"), 0, 1)


def test_beds_are_paired_with_the_float_arm(
    scripts: dict[str, ModuleType], fake_loop: Any, tmp_path: Path
) -> None:
    bed = scripts["beds"].REFERENCE_BED
    reference = fake_loop.run(arm("good"), bed, 3)
    assert reference.pair is None and reference.success.episodes == 9
    found = fake_loop.run(arm("bad"), bed, 3)
    assert (found.pair.a, found.pair.b) == ("good", "bad")
    assert found.pair.both + found.pair.only_b == found.success.successes
    assert found.smoothness is not None and found.episodes_per_minute > 0
    again = fake_loop.run(arm("bad"), bed, 3)
    assert again == msgspec.structs.replace(found, episodes_per_minute=None)
    hard = msgspec.structs.replace(
        bed, name="hard", perturbation=scripts["beds"].Perturbation(camera=0.1)
    )
    assert fake_loop.run(arm("bad"), hard, 2).pair is None
    assert len(list(tmp_path.rglob("*.jsonl"))) == 3


def test_a_bed_must_have_been_swept(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    with pytest.raises(QuantVLAError, match=r"no such bed; find it first: python benchmarks"):
        scripts["beds"].read_bed(tmp_path / "hard_bed.json")


def rate(successes: int) -> TaskResult:
    return TaskResult(episodes=10, successes=successes, rate=successes / 10, ci95=(0.1, 0.9))


def test_a_sweep_climbs_until_it_is_too_hard(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sweep = scripts["sweep"]
    outcome = {0.02: 9, 0.04: 7, 0.06: 5, 0.09: 8}
    monkeypatch.setattr(
        sweep.Sweeper, "run", lambda _self, bed: rate(outcome[bed.perturbation.camera])
    )
    monkeypatch.setattr(sweep, "total", lambda found: found)
    sweeper = sweep.Sweeper(arm("float"), tmp_path, 10, 0, 1)
    rungs = sweeper.climb("camera", ("go",), 0.6)
    assert [rung.strength for rung in rungs] == [0.02, 0.04, 0.06]
    assert sweep.choose(rungs, "camera", 0.6).strength == 0.04
    with pytest.raises(QuantVLAError, match="--bed camera: the float policy masters no step"):
        sweep.choose(rungs[2:], "camera", 0.6)
    assert sweep.bed_of("steps", 2, ("go",)).denoise_steps == 2


def test_the_page_has_every_arm_and_every_number(
    scripts: dict[str, ModuleType], commands: list[str], arguments: list[str], fake_loop: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    benchmark = scripts["run"].Benchmark(scripts["run"].parse_options(arguments))
    benchmark.compile()
    benchmark.compare()
    beds, sweep, render = scripts["beds"], scripts["sweep"], scripts["render"]
    bed = sweep.bed_of("camera", 0.1, ("go", "fetch"))
    for spec in (beds.REFERENCE_BED, msgspec.structs.replace(bed, name="hard")):
        for name, fake in (("float", "good"), ("w4a8", "bad")):
            found = fake_loop.run(arm(fake), spec, 2)
            kept = benchmark.records[name].beds
            benchmark._keep(name, beds={**kept, spec.name: found})
    rungs = tuple(
        sweep.Rung(kind="camera", strength=s, success=rate(n)) for s, n in ((0.1, 7), (0.2, 4))
    )
    swept = sweep.Sweep(
        bed=bed, chosen=rate(7), kind="camera", master=0.6,
        plain={"go": rate(10), "fetch": rate(9)}, rungs=rungs, episodes_per_task=10, seed=50,
        source_sha256="0",
    )  # fmt: skip
    records = render.read_results(tmp_path / "results")
    assert [record.arm for record in records] == ["float", "w4a8"]
    words = render.Words(
        intro="# A page", findings="What it says: nothing yet.", folder="f", results="r"
    )
    page = render.page(records, swept, [], words)
    w4a8 = records[1]
    assert f"{100 * w4a8.compared.result.error.nrmse:.2f} %" in page
    assert "not measured here: `all-w4a8`" in page and "`w4a8`" not in page
    assert "--perturb camera=0.1` on go, fetch" in page and "What it says" in page
    assert page.startswith("# A page\n\n") and "](f/sweep.png)" in page and "`r/*.json`" in page
    assert scripts["tables"].format_success(w4a8.beds["hard"].success) in page
    for png in (
        scripts["fidelity_figures"].size_png(records),
        scripts["fidelity_figures"].beds_png(records),
        scripts["fidelity_figures"].sweep_png(swept),
        render.comparison_png(render.comparison(records)),
    ):
        assert png.startswith(b"\x89PNG")


def test_every_bundled_recipe_has_its_place_on_the_page(scripts: dict[str, ModuleType]) -> None:
    assert set(scripts["render"].ORDER) == {"float", *bundled_recipes()}


def test_a_page_without_the_float_arm(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    with pytest.raises(QuantVLAError, match="holds no result of the float arm; run benchmarks"):
        scripts["render"].read_results(tmp_path)
