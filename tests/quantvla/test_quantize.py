from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_observations import random_observation
from safetensors.torch import load_file, save_file

from quantvla.calib_sets import CalibrationSet, open_set
from quantvla.calibrate import collect_statistics
from quantvla.checkpoint import load_quantized, read_card
from quantvla.families import load_policy
from quantvla.quantize import quantize
from quantvla.recipe import read_recipe
from quantvla.runtime import files
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.files import sha256_tree

RECIPE = read_recipe("w4a8")


def ignore(_what: str, _done: int, _total: int) -> None:
    pass


@pytest.fixture(scope="module")
def calibration(tiny_set: Path) -> CalibrationSet:
    return open_set(tiny_set).part("calibration")


def test_statistics_are_of_all_frames_and_all_denoise_steps(
    tiny_checkpoint: Path, calibration: CalibrationSet, tmp_path: Path, tiny_size: Any
) -> None:
    loaded = load_policy(tiny_checkpoint)
    llm = next(s for s in loaded.used_sites if s.part == "llm" and s.kind == "gate_proj")
    mlp = next(s for s in loaded.used_sites if s.part == "expert" and s.kind == "down_proj")
    statistics = collect_statistics(
        loaded, [llm.name, mlp.name], calibration, seed=0, journal=tmp_path, progress=ignore
    )
    frames = len(calibration)
    assert statistics[llm.name].calls == frames
    assert statistics[mlp.name].calls == frames * tiny_size.denoise_steps
    assert statistics[mlp.name].tokens == frames * tiny_size.denoise_steps * tiny_size.chunk


def test_second_moments_are_those_of_the_inputs(
    tiny_checkpoint: Path, calibration: CalibrationSet, tmp_path: Path
) -> None:
    loaded = load_policy(tiny_checkpoint)
    name = next(s.name for s in loaded.used_sites if s.part == "llm" and s.kind == "o_proj")
    rows: list[torch.Tensor] = []
    handle = loaded.policy.get_submodule(name).register_forward_pre_hook(
        lambda _m, inputs: rows.append(inputs[0].reshape(-1, inputs[0].shape[-1]).double())
    )
    found = collect_statistics(
        loaded, [name], calibration, seed=0, journal=tmp_path, progress=ignore
    )[name]
    handle.remove()
    seen = torch.cat(rows)
    assert torch.allclose(found.second_moment, seen.square().mean(0), rtol=1e-12)
    assert torch.allclose(found.largest.double(), seen.abs().amax(0))


def test_an_input_that_is_not_finite_names_site_and_frame(
    tiny_checkpoint: Path, calibration: CalibrationSet, tmp_path: Path
) -> None:
    loaded = load_policy(tiny_checkpoint)
    name = next(s.name for s in loaded.used_sites if s.part == "expert" and s.kind == "down_proj")
    up = loaded.policy.get_submodule(name.replace("down_proj", "up_proj"))
    with torch.no_grad():
        up.weight[0, 0] = torch.inf
    with pytest.raises(
        QuantVLAError, match=rf"{name}, calibration frame \d+: its input is not finite"
    ):
        collect_statistics(loaded, [name], calibration, seed=0, journal=tmp_path, progress=ignore)


def test_same_input_same_bytes(
    tiny_checkpoint: Path, calibration: CalibrationSet, tiny_quantized: Path, tmp_path: Path
) -> None:
    quantize(tiny_checkpoint, calibration, RECIPE, tmp_path / "again")
    assert sha256_tree(tmp_path / "again") == sha256_tree(tiny_quantized)


def test_another_seed_gives_other_statistics(
    tiny_checkpoint: Path, calibration: CalibrationSet, tiny_quantized: Path, tmp_path: Path
) -> None:
    quantize(tiny_checkpoint, calibration, RECIPE, tmp_path / "other", seed=1)
    assert (tmp_path / "other" / "quantized.safetensors").read_bytes() != (
        tiny_quantized / "quantized.safetensors"
    ).read_bytes()


class StopError(Exception):
    pass


@pytest.mark.parametrize(("stage", "at"), [("calibrating", 5), ("rounding weights", 7)])
def test_an_interrupted_run_continues_to_the_same_bytes(
    tiny_checkpoint: Path, calibration: CalibrationSet, tiny_quantized: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, stage: str, at: int,
) -> None:  # fmt: skip
    monkeypatch.setattr("quantvla.calibrate.SAVE_EVERY_FRAMES", 2)
    output = tmp_path / "out"
    seen: list[tuple[str, int]] = []

    def interrupt(what: str, done: int, total: int) -> None:
        if (what, done) == (stage, at):
            raise StopError

    with pytest.raises(StopError):
        quantize(tiny_checkpoint, calibration, RECIPE, output, progress=interrupt)
    assert not output.exists()
    quantize(
        tiny_checkpoint, calibration, RECIPE, output,
        progress=lambda what, done, _total: seen.append((what, done)),
    )  # fmt: skip
    assert ("calibrating", 0) not in seen  # finished frames are not run again
    assert sha256_tree(output) == sha256_tree(tiny_quantized)
    assert not output.with_name("out.work").exists()


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_broken_and_resumes(
    tiny_checkpoint: Path, tiny_set: Path, tiny_quantized: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command = [
        sys.executable, "-m", "quantvla", "quantize", "--policy.path", str(tiny_checkpoint),
        "--calib", str(tiny_set), "-o", str(output),
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    weights = output.with_name("out.work") / "pass-0" / "weights"
    deadline = time.monotonic() + 240
    while not (weights.is_dir() and len(list(weights.iterdir())) > 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not output.exists()
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    assert sha256_tree(output) == sha256_tree(tiny_quantized)


def test_work_of_another_job_is_not_used(
    tiny_checkpoint: Path, calibration: CalibrationSet, tiny_quantized: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    work = output.with_name("out.work")
    (work / "weights").mkdir(parents=True)
    (work / "job").write_text("another job")
    (work / "statistics.safetensors").write_bytes(b"garbage")
    quantize(tiny_checkpoint, calibration, RECIPE, output)
    assert sha256_tree(output) == sha256_tree(tiny_quantized)


def test_a_full_disk_is_one_clear_error_and_nothing_is_half_written(
    tiny_checkpoint: Path,
    calibration: CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(_directory: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "fsync_tree", full)
    with pytest.raises(QuantVLAError, match=r"out: could not be written, got .*No space left"):
        quantize(tiny_checkpoint, calibration, RECIPE, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_an_existing_output_is_kept_unless_told(
    tiny_checkpoint: Path, calibration: CalibrationSet, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(
        QuantVLAError, match="already exists; choose another output or pass --overwrite"
    ):
        quantize(tiny_checkpoint, calibration, RECIPE, tmp_path / "out")


def test_a_set_of_another_robot_is_refused(
    tiny_checkpoint: Path, tiny_size: Any, tmp_path: Path
) -> None:
    directory = tmp_path / "other"
    directory.mkdir()
    for index in range(6):
        observation = random_observation(tiny_size, index)
        observation["observation.state"] = np.zeros(7, np.float32)
        np.savez(directory / f"{index}.npz", **observation, episode=index // 2, frame=index % 2)
    with pytest.raises(QuantVLAError, match=r"expected 5.*got 7|state"):
        quantize(tiny_checkpoint, open_set(directory), RECIPE, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_planned_site_that_no_pass_quantizes_is_an_error(
    tiny_checkpoint: Path, calibration: CalibrationSet, tmp_path: Path
) -> None:
    import msgspec

    with pytest.raises(QuantVLAError, match="no pass of recipe 'w4a8' quantizes it"):
        quantize(
            tiny_checkpoint,
            calibration,
            msgspec.structs.replace(RECIPE, passes=()),
            tmp_path / "out",
        )


def test_the_checkpoint_carries_the_float_rest_and_only_that(
    tiny_checkpoint: Path, tiny_quantized: Path
) -> None:
    source = load_file(tiny_checkpoint / "model.safetensors")
    rest = load_file(tiny_quantized / "policy" / "model.safetensors")
    card = read_card(tiny_quantized)
    gone = {f"{entry.site}.weight" for entry in (*card.plan.quantized, *card.plan.dropped)}
    assert rest.keys() == source.keys() - gone
    assert all(torch.equal(value, source[name]) for name, value in rest.items())
    assert card.calibration.samples.keys() == {entry.site for entry in card.plan.quantized}


def test_stored_bytes_are_the_planned_ones(tiny_quantized: Path) -> None:
    tensors = load_file(tiny_quantized / "quantized.safetensors")
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert stored == sum(entry.bytes_after for entry in read_card(tiny_quantized).plan.quantized)


def test_loading_puts_integer_linears_in_place(tiny_quantized: Path) -> None:
    loaded, card = load_quantized(tiny_quantized)
    for entry in card.plan.quantized:
        module: Any = loaded.policy.get_submodule(entry.site)
        assert (
            module.quantized.codes.dtype == torch.int8
            and module.quantized.block == entry.scheme.block
        )


def test_damaged_checkpoints_are_refused(
    tiny_quantized: Path, tmp_path: Path, write_npz_set: Callable[..., Path]
) -> None:
    copy = Path(shutil.copytree(tiny_quantized, tmp_path / "copy"))
    tensors = load_file(copy / "quantized.safetensors")
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1
    save_file(tensors, copy / "quantized.safetensors")
    with pytest.raises(
        QuantVLAError, match=r"quantized\.safetensors: missing or changed since it was written"
    ):
        load_quantized(copy)
    with pytest.raises(QuantVLAError, match="not a quantized checkpoint"):
        load_quantized(tmp_path)
