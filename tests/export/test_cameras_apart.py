"""An engine whose vision takes one camera at a time computes what the one for all cameras does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from quantvla.calib_sets import open_set
from quantvla.cli.export import export
from quantvla.export.cameras import cameras_apart
from quantvla.export.engine import export_engine
from quantvla.families import load_policy
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.manifest import read_manifest
from quantvla.runtime.policy import Policy
from quantvla.runtime.processing_steps import Images
from quantvla.verify import verify


def test_integer_engine_camera_by_camera(
    tiny_quantized: Path, tiny_integer_engine: Path, tiny_float_engine: Path, tiny_checkpoint: Path,
    tiny_set: Path, tmp_path: Path,
) -> None:  # fmt: skip
    export_engine(tiny_quantized, "cpu", tmp_path / "engine", one_camera=True)
    manifest = read_manifest(tmp_path / "engine")
    assert manifest.stages[0].repeat == len(manifest.cameras) > 1
    heldout = open_set(tiny_set).part("heldout")
    with (
        Policy.from_pretrained(tmp_path / "engine", threads=1) as apart,
        Policy.from_pretrained(tiny_integer_engine, threads=1) as whole,
    ):
        obs = {k: v for k, v in heldout[0].observation.items() if k in apart.preprocessor.keys}
        np.testing.assert_allclose(
            *(p.predict_action_chunk(obs, seed=0) for p in (apart, whole)), atol=1e-4
        )
    report = verify(
        tmp_path / "engine", tiny_checkpoint, heldout, float_engine=tiny_float_engine,
        quantized=tiny_quantized,
    )  # fmt: skip
    assert report.passed and report.kernel.max_abs is not None and report.kernel.max_abs < 1e-3


def test_one_camera_or_a_gpu_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    loaded = load_policy(tiny_checkpoint)
    interface = loaded.interface
    (images,) = (step for step in interface.preprocess if isinstance(step, Images))
    one = msgspec.structs.replace(images, keys=images.keys[:1])
    others = [step for step in interface.preprocess if step is not images]
    single = replace(loaded, interface=replace(interface, preprocess=(one, *others)))
    with pytest.raises(QuantVLAError, match="--cameras-apart: the policy's vision has one camera"):
        cameras_apart(single)
    asked = [str(tiny_checkpoint), "--target", "rtx", "--cameras-apart", "-o", str(tmp_path / "x")]
    with pytest.raises(QuantVLAError, match="target rtx: runs all cameras in one call"):
        CliRunner().invoke(export, asked, catch_exceptions=False)
