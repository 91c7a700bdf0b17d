"""`quantvla compare` on tiny engines and checkpoints: results, resuming, refusals, JSON."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from quantvla.calib_sets import CalibrationSet, open_set
from quantvla.calibrate import frame_noise
from quantvla.cli.compare import FIGURE_FILE, RESULT_FILE, command
from quantvla.evaluate.arms import Arm, identify_arm
from quantvla.fidelity import recording
from quantvla.fidelity.compare import Comparison, ComparisonPlan, compare
from quantvla.runtime.errors import QuantVLAError

PLAN = ComparisonPlan(noises=8, permutations=99)


@pytest.fixture(scope="module")
def heldout(tiny_set: Path) -> CalibrationSet:
    return open_set(tiny_set).part("heldout")


@pytest.fixture(scope="module")
def engines(tiny_float_engine: Path, tiny_integer_engine: Path) -> tuple[Arm, Arm]:
    return identify_arm("float", tiny_float_engine), identify_arm("w4a8", tiny_integer_engine)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("samples")


@pytest.fixture(scope="module")
def result(
    engines: tuple[Arm, Arm], tiny_quantized: Path, heldout: CalibrationSet, work: Path
) -> Comparison:
    arms = [engines[1], identify_arm("reference", tiny_quantized)]
    return compare(engines[0], arms, heldout, PLAN, work=work)


def test_an_engine_and_its_torch_reference_have_the_same_error(result: Comparison) -> None:
    engine, reference = result.arms["w4a8"], result.arms["reference"]
    assert (engine.kind, reference.kind) == ("engine", "quantized")
    assert engine.error.nrmse > 0
    assert engine.error.nrmse == pytest.approx(reference.error.nrmse, rel=0.2)
    assert len(engine.velocity_free_running) == len(engine.velocity_teacher_forced) == 10
    assert engine.velocity_free_running[0] == pytest.approx(engine.velocity_teacher_forced[0])
    for arm in result.arms.values():
        assert 0 < arm.distribution.energy.p <= 1 and arm.distribution.draws == 8


def test_an_arm_equal_to_the_reference_has_no_error(
    engines: tuple[Arm, Arm], heldout: CalibrationSet
) -> None:
    same = msgspec.structs.replace(engines[0], name="same")
    found = compare(engines[0], [same], heldout, PLAN).arms["same"]
    assert found.error.nrmse == found.error.max_abs == 0
    assert found.distribution.energy.ratio == found.distribution.mmd.ratio == 1
    assert set(found.velocity_free_running) == {0.0}


def test_finished_frames_are_not_sampled_again(
    result: Comparison, engines: tuple[Arm, Arm], heldout: CalibrationSet, work: Path,
    tiny_quantized: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    next(work.glob("w4a8-*/00001.npz")).unlink()
    drawn: list[int] = []
    original = recording.draw

    def spy(*given: object) -> object:
        drawn.append(given[2])  # type: ignore[arg-type]
        return original(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(recording, "draw", spy)
    arms = [engines[1], identify_arm("reference", tiny_quantized)]
    assert compare(engines[0], arms, heldout, PLAN, work=work) == result
    assert drawn == [1]


def test_processes_do_not_change_the_result(
    result: Comparison, engines: tuple[Arm, Arm], heldout: CalibrationSet
) -> None:
    plan = ComparisonPlan(noises=8, permutations=99, processes=2)
    assert compare(engines[0], [engines[1]], heldout, plan).arms["w4a8"] == result.arms["w4a8"]


def test_noises_are_those_of_verification_first(heldout: CalibrationSet) -> None:
    shape = (1, 8, 32)
    noises = recording.shared_noises(3, 5, 4, shape)
    assert np.array_equal(noises[0], frame_noise(3, 5, shape))
    assert not np.allclose(noises, recording.own_noises(3, 5, 4, shape))


def test_refusals(engines: tuple[Arm, Arm], heldout: CalibrationSet) -> None:
    reference, arm = engines
    with pytest.raises(QuantVLAError, match="arms: name used twice, got 'float'; name them"):
        compare(reference, [reference], heldout, PLAN)
    with pytest.raises(QuantVLAError, match="arms: nothing to compare 'float' with; give two"):
        compare(reference, [], heldout, PLAN)
    for change, message in (
        ({"action_dim": 7}, "of another robot than float: expected action dimension 4, got 7"),
        ({"cameras": ("observation.images.top",)}, r"expected cameras .*, got .*images.top"),
        ({"state_dim": 9}, "expected state length 5, got 9; compare policies of one robot"),
    ):
        other = msgspec.structs.replace(
            arm, contract=msgspec.structs.replace(arm.contract, **change)
        )
        with pytest.raises(QuantVLAError, match=message):
            compare(reference, [other], heldout, PLAN)


def test_a_set_of_another_robot_is_refused(engines: tuple[Arm, Arm]) -> None:
    bundled = open_set(Path(recording.__file__).parents[2] / "calib_sets" / "metaworld")
    with pytest.raises(QuantVLAError, match="metaworld: is of another robot: the policy needs"):
        compare(engines[0], [engines[1]], bundled.part("heldout"), PLAN)


def test_the_command(
    tiny_float_engine: Path, tiny_integer_engine: Path, tiny_set: Path, tmp_path: Path
) -> None:
    arguments = [
        f"float={tiny_float_engine}", str(tiny_integer_engine), "--set", str(tiny_set),
        "--noises", "8", "--permutations", "19", "-o", str(tmp_path),
    ]  # fmt: skip
    printed = CliRunner().invoke(command, [*arguments, "--json"])
    assert printed.exit_code == 0, printed.output
    found = json.loads(printed.stdout)
    assert found == json.loads((tmp_path / RESULT_FILE).read_text())
    assert {"reference", "arms", "frames", "noises", "set", "seed", "dimensions"} <= set(found)
    arm = found["arms"]["w4a8"]
    assert {"nrmse", "nrmse_per_dimension", "cosine_p5", "gripper_flips"} <= set(arm["error"])
    assert {"value", "floor", "ratio", "p", "null_p95"} == set(arm["distribution"]["mmd"])
    assert {"jerk", "step", "seam", "overlap", "seams"} == set(arm["smoothness"])
    assert (tmp_path / FIGURE_FILE).read_bytes().startswith(b"\x89PNG")
    table = CliRunner().invoke(command, arguments)
    assert "sliced Wasserstein" in table.stdout and "w4a8" in table.stdout
