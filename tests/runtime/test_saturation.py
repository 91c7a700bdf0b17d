"""Sums of uint8 by int8 products: right on every processor, and fast where VNNI makes them so."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from quantvla.mixed.profile import this_machine
from quantvla.runtime import kernels, machine
from quantvla.runtime.backend import backend_for

CPUINFO = "processor: 0\nmodel name: Test\nflags: fpu avx2 {}\n\nprocessor: 1\nflags: none\n"


def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, system: str) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(CPUINFO.format(flags))
    monkeypatch.setattr(machine, "_CPUINFO", path)
    monkeypatch.setattr(platform, "machine", lambda: system)


@pytest.mark.parametrize(
    ("flags", "system", "saturates"),
    [
        ("avx512f", "x86_64", True),
        ("avx512f avx512_vnni", "x86_64", False),
        ("avx_vnni", "AMD64", False),
        ("", "aarch64", False),
    ],
)
def test_the_safe_setting_is_for_x86_without_vnni_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, system: str, saturates: bool
) -> None:
    pretend(monkeypatch, tmp_path, flags, system)
    assert machine.saturates_u8s8() == saturates
    options = kernels.session_options()
    if saturates:
        assert options.get_session_config_entry(kernels.SATURATION_SAFE) == "1"
    else:
        with pytest.raises(RuntimeError, match=kernels.SATURATION_SAFE):
            options.get_session_config_entry(kernels.SATURATION_SAFE)
    assert ("u8s8" in backend_for("cpu").versions()) == saturates
    assert ("no VNNI" in this_machine("cpu", 1).engine_library) == saturates  # a profile's key


def test_an_x86_that_does_not_tell_is_taken_for_one_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend(monkeypatch, tmp_path, "avx512_vnni", "x86_64")
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "absent")
    assert machine.saturates_u8s8()


def test_sums_at_the_end_of_the_range_are_exact_here() -> None:
    """255 * 127 twice is beyond 16 bits: wrong where this processor's kernels saturate and nothing is done."""
    x = np.ones((4, 64), np.float32)
    weight = np.full((64, 32), 127, np.int8)
    scale = np.ones(32, np.float32)
    node = helper.make_node("DynamicQuantizeMatMul", ["x", "w", "s"], ["y"], domain="com.microsoft")
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (4, 32))],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(scale, "s")],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), kernels.session_options())
    np.testing.assert_allclose(session.run(None, {"x": x})[0], 64 * 127, rtol=1e-6)
