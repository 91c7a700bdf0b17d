"""Estimates: arithmetic that can be checked by hand, and figures others published."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from quantvla.cli.estimate import estimate as command
from quantvla.cli.estimate import published_rows
from quantvla.known_shapes import MODELS
from quantvla.roofline import BANDWIDTH_SHARE, COMPUTE_SHARE, Product, StageWork, estimate
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.targets import BOARDS

ORIN = BOARDS["agx-orin-64"]


def test_a_large_product_takes_its_arithmetic() -> None:
    work = StageWork("s", 3, (Product("p", 4096, 4096, 4096),), kernels=0)
    found = estimate("x", [work], ORIN, "fp16").stages[0]
    assert found.total_ms == pytest.approx(3e3 * 2 * 4096**3 / (42.5e12 * COMPUTE_SHARE), rel=1e-3)
    assert found.bound == "compute" and found.giga_operations == pytest.approx(3 * 137.4, rel=1e-3)


def test_one_token_takes_the_bytes_of_the_weight_in_its_format() -> None:
    work = StageWork("s", 1, (Product("p", 1, 4096, 4096),), kernels=0)
    bits = {"fp16": 16, "int8": 8, "int4": 4.5}
    for number_format, wide in bits.items():
        found = estimate("x", [work], ORIN, number_format).stages[0]
        assert found.weight_mb == pytest.approx(4096**2 * wide / 8e6, rel=1e-3)
        assert found.memory_ms == pytest.approx(
            found.weight_mb / (204.8 * BANDWIDTH_SHARE), rel=0.01
        )
        assert found.bound == "memory"


def test_kernels_cost_their_launches() -> None:
    work = StageWork("s", 10, (), kernels=100)
    found = estimate("x", [work], ORIN, "fp16").stages[0]
    assert found.total_ms == found.launch_ms == pytest.approx(10 * 100 * ORIN.launch_us / 1e3)


def test_fewer_bits_and_more_bandwidth_are_never_slower() -> None:
    for model in MODELS.values():
        times = [
            estimate("x", model.works(), BOARDS[board], name).total_ms
            for board, name in (
                ("orin-nx-16", "fp16"),
                ("agx-orin-64", "fp16"),
                ("agx-orin-64", "int8"),
                ("rtx-4090", "int8"),
                ("rtx-5090", "int8"),
            )
        ]
        assert times == sorted(times, reverse=True)


def test_known_shapes_have_the_parameters_their_models_have() -> None:
    weights = {
        name: sum(s.weight_mb for s in estimate("x", m.works(), ORIN, "int8").stages)
        for name, m in MODELS.items()
    }  # int8: megabytes are millions of parameters
    assert weights["smolvla"] == pytest.approx(343, rel=0.05)
    assert weights["pi05"] == pytest.approx(2704, rel=0.05)


def test_estimates_are_within_a_factor_of_two_of_published_figures() -> None:
    rows = published_rows()
    near = [row for row in rows if 0.5 <= row.ratio <= 2]
    assert len(near) >= 6 and len({row.model for row in near}) >= 3
    assert all(0.4 <= row.ratio <= 2 for row in rows)


def test_an_estimate_is_called_one() -> None:
    found = CliRunner().invoke(command, ["--model", "smolvla", "--board", "agx-orin-64"])
    assert found.exit_code == 0 and "ESTIMATE, not measured" in found.output
    found = CliRunner().invoke(command, ["--model", "smolvla", "--board", "agx-orin-64", "--json"])
    assert '"note": "estimate: roofline' in found.output
    found = CliRunner().invoke(command, ["--published"])
    assert "FlashRT" in found.output


def test_what_cannot_be_estimated_is_refused() -> None:
    with pytest.raises(QuantVLAError, match=r"model 'smolvla2': unknown; did you mean 'smolvla'"):
        CliRunner().invoke(command, ["--model", "smolvla2"], catch_exceptions=False)
    with pytest.raises(QuantVLAError, match=r"expected either ENGINE or --model"):
        CliRunner().invoke(command, [], catch_exceptions=False)
    with pytest.raises(
        QuantVLAError, match=r"board rtx-4090: belongs to target rtx, got --target jetson-orin"
    ):
        CliRunner().invoke(
            command, ["--model", "pi05", "--target", "jetson-orin", "--board", "rtx-4090"],
            catch_exceptions=False,
        )  # fmt: skip
    with pytest.raises(QuantVLAError, match=r"board agx-orin-64: no published rate for fp8"):
        CliRunner().invoke(
            command, ["--model", "pi05", "--board", "agx-orin-64", "--format", "fp8"],
            catch_exceptions=False,
        )  # fmt: skip
