"""Fewer denoise steps at fitted times: the file, the fit, and the engine that runs them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from quantvla import staged
from quantvla.calib_sets import limit, open_set
from quantvla.calibrate import frame_noise
from quantvla.cli.export import export
from quantvla.cli.schedule import schedule as command
from quantvla.export.engine import export_engine
from quantvla.families import load_policy
from quantvla.families.base import LoadedPolicy
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.manifest import EulerSampler, read_manifest
from quantvla.runtime.policy import Policy
from quantvla.schedule import Schedule, read_schedule, sampler_at, scheduled
from quantvla.schedule_fit import fit_schedule
from quantvla.verify import verify

SAMPLER = EulerSampler(
    stage="denoise", state="x", time="t", velocity="v", timesteps=(1.0, 0.75, 0.5, 0.25), step=-0.25,
    noise_shape=(1, 2, 3),
)  # fmt: skip


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedPolicy:
    return load_policy(tiny_checkpoint)


@pytest.fixture(scope="module")
def fitted(loaded: LoadedPolicy, tiny_set: Path) -> Schedule:
    return fit_schedule(loaded, open_set(tiny_set), 3, frames=4, heldout_frames=2, seed=0)


def written(schedule: Schedule, path: Path) -> Path:
    path.write_bytes(msgspec.json.encode(schedule))
    return path


def test_fitted_times_are_no_worse_than_equal_ones_where_they_were_fitted(fitted: Schedule) -> None:
    ours, equal = fitted.on_calibration.fitted, fitted.on_calibration.equal
    assert 0 < ours.nrmse + ours.mean <= equal.nrmse + equal.mean
    assert fitted.steps == 3 and fitted.times[0] == 1 and fitted.times[-1] == 0
    assert (fitted.frames, fitted.heldout_frames) == (4, 2)


def test_the_same_fit_gives_the_same_file(
    fitted: Schedule, loaded: LoadedPolicy, tiny_set: Path
) -> None:
    again = fit_schedule(loaded, open_set(tiny_set), 3, frames=4, heldout_frames=2, seed=0)
    assert msgspec.json.encode(again) == msgspec.json.encode(fitted)


def test_frames_in_one_stack_are_judged_as_each_alone(
    fitted: Schedule, loaded: LoadedPolicy, tiny_set: Path
) -> None:
    chosen = limit(open_set(tiny_set), frames=4, heldout_frames=2, seed=fitted.seed)
    part = chosen.part("heldout")
    preprocess = staged.make_preprocessor(loaded.interface)
    few = scheduled(loaded, fitted.checkpoint_sha256, fitted)
    dim, pairs = loaded.interface.action.dim, []
    for index in range(len(part)):
        context = staged.run_context(loaded, staged.prepare(preprocess, part[index].observation))
        noise = frame_noise(fitted.seed + 1, index, loaded.interface.sampler.noise_shape)
        pairs.append([staged.sample(p, context, noise)[0, :, :dim] for p in (few, loaded)])
    found, own = (np.stack(column) for column in zip(*pairs, strict=True))
    nrmse = np.sqrt(np.square(found - own).mean() / np.square(own).mean())
    assert nrmse == pytest.approx(fitted.on_heldout.fitted.nrmse, rel=1e-3)


@pytest.mark.parametrize("steps", [0, 1, 10, 11])
def test_steps_that_leave_nothing_to_fit(loaded: LoadedPolicy, tiny_set: Path, steps: int) -> None:
    with pytest.raises(QuantVLAError, match=rf"schedule steps: expected 2 to 9.*got {steps}"):
        fit_schedule(loaded, open_set(tiny_set), steps, frames=4, heldout_frames=2, seed=0)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ((), "expected times from 1 to 0, got none"),
        ((1.0,), "expected times from 1 to 0, got 1"),
        ((0.9, 0.5, 0.0), "expected times from 1 to 0, got 0.9, 0.5, 0"),
        ((1.0, 0.5, 0.1), "expected times from 1 to 0, got 1, 0.5, 0.1"),
        ((0.0, 0.5, 1.0), "expected times from 1 to 0"),
        ((1.0, 0.4, 0.5, 0.0), "times must fall all the way, got 0.4 and then 0.5"),
        ((1.0, 0.5, 0.5, 0.0), "times must fall all the way, got 0.5 and then 0.5"),
        ((1.0, float("nan"), 0.0), "times must fall all the way, got 1 and then nan"),
    ],
)
def test_times_that_are_no_schedule(times: tuple[float, ...], message: str) -> None:
    with pytest.raises(QuantVLAError, match=f"^schedule: {message}"):
        sampler_at(SAMPLER, times)


def test_equal_times_are_equal_steps() -> None:
    found = sampler_at(SAMPLER, (1.0, 0.5, 0.0))
    assert found.timesteps == (1.0, 0.5) and found.sizes == (-0.5, -0.5)


def test_bad_files(fitted: Schedule, tmp_path: Path) -> None:
    with pytest.raises(QuantVLAError, match="no such file; make it with `quantvla schedule`"):
        read_schedule(tmp_path / "none.json")
    for content in (b"{}", b"1 0.5 0", msgspec.json.encode(fitted).replace(b'"seed"', b'"sed"')):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(QuantVLAError, match=r"bad\.json: not a schedule"):
            read_schedule(tmp_path / "bad.json")
    newer = written(msgspec.structs.replace(fitted, version=2), tmp_path / "newer.json")
    with pytest.raises(QuantVLAError, match="expected a schedule of version 1, got 2"):
        read_schedule(newer)


def test_a_schedule_of_another_policy_is_refused(fitted: Schedule, loaded: LoadedPolicy) -> None:
    with pytest.raises(QuantVLAError, match="was fitted for another policy"):
        scheduled(loaded, "0" * 64, fitted)


def test_an_engine_denoises_at_the_times_of_the_schedule(
    fitted: Schedule, tiny_checkpoint: Path, tiny_float_engine: Path, tiny_set: Path, tmp_path: Path
) -> None:
    export_engine(tiny_checkpoint, "cpu", tmp_path / "engine", schedule=fitted)
    manifest = read_manifest(tmp_path / "engine")
    assert manifest.sampler.timesteps == fitted.times[:-1] and manifest.stages[-1].repeat == 3
    report = verify(
        tmp_path / "engine", tiny_checkpoint, open_set(tiny_set).part("heldout"),
        float_engine=tiny_float_engine,
    )  # fmt: skip
    assert report.passed and report.parity.max_abs < 1e-4
    assert report.quantization.nrmse < 1e-5 and report.schedule_nrmse is not None
    assert report.schedule_nrmse > 100 * report.quantization.nrmse
    with Policy.from_pretrained(tmp_path / "engine") as policy:
        obs = policy.blank_observation()
        own, equal, one = (policy.predict_action_chunk(obs, seed=0, steps=n) for n in (None, 3, 1))
        np.testing.assert_array_equal(own, equal)
        assert not np.allclose(own, one)
        with pytest.raises(QuantVLAError, match="denoise steps: expected 1 to 3"):
            policy.predict_action_chunk(obs, seed=0, steps=4)


def test_command_writes_the_file(tiny_checkpoint: Path, tiny_set: Path, tmp_path: Path) -> None:
    file = tmp_path / "two.json"
    arguments = [
        "--policy.path", str(tiny_checkpoint), "--calib", str(tiny_set), "--steps", "2", "--frames", "4",
        "--heldout-frames", "2", "-o", str(file),
    ]  # fmt: skip
    shown = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert shown.exit_code == 0 and "held-out frames, fitted" in shown.output
    with pytest.raises(QuantVLAError, match="already exists"):
        CliRunner().invoke(command, arguments, catch_exceptions=False)
    asked = [str(tiny_checkpoint), "--schedule", str(file), "-o", str(tmp_path / "engine")]
    assert read_schedule(file).steps == 2
    with pytest.raises(QuantVLAError, match="target rtx: has the policy's own equal steps"):
        CliRunner().invoke(
            export, [*asked, "--target", "rtx", "--overwrite"], catch_exceptions=False
        )
