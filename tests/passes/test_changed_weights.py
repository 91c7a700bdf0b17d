"""What passes keep of a policy of many gigabytes lives in files: it does not fit in memory twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantvla import float_weights, lockstep, tensor_file
from quantvla.calib_sets import CalibrationSet
from quantvla.passes import BalanceOutputs, FoldNorms, Gptq, Pass, RoundWeights, Smooth
from quantvla.pipeline import Pipeline
from quantvla.quantize import quantize
from quantvla.recipe import Recipe, read_recipe
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.files import sha256_tree


def mapped_file(address: int) -> str:
    """Return the file whose pages are at ``address``, "" for memory of the process's own."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        region, *_, last = line.split(maxsplit=5)
        low, high = (int(end, 16) for end in region.split("-"))
        if low <= address < high:
            return last if last.startswith("/") else ""
    return ""


def recipe(*passes: Pass) -> Recipe:
    base = read_recipe("rtn-w4a8")
    return Recipe(name="test", rules=base.rules, default=base.default, passes=passes)


def files(work: Path) -> dict[str, Path]:
    return {path.name.removesuffix(".safetensors"): path for path in work.glob("pass-*/floats/*")}


def test_what_a_pass_changed_are_pages_of_its_files(
    pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    passes = (Smooth(exponents=(0.25,)), RoundWeights())
    made = pipeline(recipe(*passes))
    made.run(passes)
    parameters = dict(made.subject.policy.named_parameters())
    found = files(tmp_path / "work")
    assert found
    for name, path in found.items():
        assert mapped_file(parameters[name].data_ptr()) == str(path)


def test_they_are_pages_already_while_the_pass_runs(
    pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    made = pipeline(recipe(FoldNorms(), RoundWeights()))
    floats = made.subject.floats
    floats.open_folder(tmp_path / "folder")
    name = f"{next(iter(made.subject.planned))}.weight"
    before = floats.get(name)
    for _ in range(2):
        floats.put_(name, 2 * floats.get(name))
    value = made.subject.policy.get_parameter(name)
    assert mapped_file(value.data_ptr()) == str(tmp_path / "folder" / f"{name}.safetensors")
    assert torch.equal(value.double(), 4 * before)
    floats.undo_()
    assert torch.equal(floats.get(name), before)


def test_a_full_disk_is_one_error_that_names_the_file(
    pipeline: Callable[..., Pipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_file, "header", full)
    made = pipeline(recipe(FoldNorms(), RoundWeights()))
    with pytest.raises(QuantVLAError, match=r"safetensors: could not be written.*No space left"):
        made.run((FoldNorms(),))
    assert not list((tmp_path / "work").rglob("*.partial"))


def test_files_that_a_later_fold_replaces_are_removed_and_those_of_a_correction_stay(
    pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    passes = (
        Smooth(exponents=(0.25,)), FoldNorms(), RoundWeights(), BalanceOutputs(band=0.0),
    )  # fmt: skip
    made = pipeline(recipe(*passes))
    made.run(passes)
    folders = [files_of(tmp_path / "work" / f"pass-{i}") for i in range(4)]
    assert folders[0] and folders[1] and not folders[2] and folders[3]
    assert not folders[0] & folders[1]
    assert folders[3] & folders[1] or folders[3] & folders[0]


def files_of(folder: Path) -> set[str]:
    return {path.name for path in (folder / "floats").glob("*")}


def test_rows_changed_a_few_at_a_time_are_those_changed_at_once(
    pipeline: Callable[..., Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pipeline()
    floats, name = made.subject.floats, f"{next(iter(made.subject.planned))}.weight"
    expected = 2 * floats.get(name)
    rows, columns = expected.shape
    calls = []

    def change(part: Tensor) -> Tensor:
        calls.append(len(part))
        return 2 * part

    monkeypatch.setattr(float_weights, "ROWS_BYTES", 5 * columns * 8)
    floats.change_rows_(name, change)
    assert max(calls) == 5 and sum(calls) == rows
    assert torch.equal(floats.get(name), expected)


def test_finished_integers_are_the_same_whether_their_float_weight_is_kept_or_not(
    tiny_checkpoint: Path, frames: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = (Gptq(step="layer", too_few="round"), BalanceOutputs(band=0.0))
    quantize(tiny_checkpoint, frames, recipe(*passes), tmp_path / "kept")
    monkeypatch.setattr(lockstep, "KEPT_BYTES", 100_000)
    quantize(tiny_checkpoint, frames, recipe(*passes), tmp_path / "made")
    assert sha256_tree(tmp_path / "kept") == sha256_tree(tmp_path / "made")


def test_what_is_kept_of_a_calibration_frame_are_pages_of_a_file(
    pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    passes = (RoundWeights(), BalanceOutputs(band=0.0))
    made = pipeline(recipe(*passes))
    made.run(passes)
    folder = tmp_path / "work" / "frames" / "0"
    for frame in made.observer._runs._frames:
        assert frame.teacher.keys() > frame.student.keys() and frame.student
        for value in (*frame.teacher.values(), *frame.student.values()):
            assert mapped_file(value.ctypes.data).startswith(str(folder))


def test_frames_to_compare_folds_with_are_run_for_recipes_that_fold(
    pipeline: Callable[..., Pipeline],
) -> None:
    made = pipeline("rtn-w4a8")
    made.run(read_recipe("rtn-w4a8").passes)
    assert made.check._expected is None
