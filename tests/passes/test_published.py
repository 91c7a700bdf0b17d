from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantvla.calib_sets import CalibrationSet
from quantvla.checkpoint import load_quantized
from quantvla.export.engine import export_engine
from quantvla.passes import Published
from quantvla.pipeline import Pipeline
from quantvla.quantize import quantize
from quantvla.quantized_linear import QuantizedLinear, SimulatedLinear
from quantvla.recipe import read_recipe
from quantvla.runtime.errors import QuantVLAError


def test_the_published_code_is_simulated_and_its_export_refused_with_the_reason(
    tiny_checkpoint: Path, frames: CalibrationSet, tmp_path: Path
) -> None:
    result = quantize(tiny_checkpoint, frames, read_recipe("published"), tmp_path / "out")
    assert [report.kind for report in result.reports] == ["published", "atm", "ohb"]
    loaded, card = load_quantized(tmp_path / "out")
    site = card.plan.quantized[0]
    linear = loaded.policy.get_submodule(site.site)
    assert isinstance(linear, QuantizedLinear) and linear.quantized.static is not None
    x = torch.randn(5, site.in_features)
    simulated = SimulatedLinear(linear.quantized, linear.bias)
    assert torch.allclose(simulated(x), linear(x), rtol=1e-5, atol=1e-5)
    # the scales saw one call: what is far beyond it saturates
    assert not torch.allclose(linear(1000 * x), 1000 * linear(x), rtol=0.5)
    with pytest.raises(
        QuantVLAError, match=r"q_proj: its activation scales are fixed per input channel"
    ):
        export_engine(tmp_path / "out", "cpu", tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_the_published_pass_needs_the_format_it_makes(pipeline: Callable[..., Pipeline]) -> None:
    with pytest.raises(QuantVLAError, match=r"got w4a8; plan it as w4a8-static"):
        pipeline("rtn-w4a8").run([Published()])
