from __future__ import annotations

import io
import json
from pathlib import Path

from click.testing import CliRunner
from rich.console import Console

from quantvla.cli.inspect import inspect
from quantvla.cli.passes import pass_line, print_passes
from quantvla.passes.base import Equivalence, Factors, PassReport


def test_a_quantized_checkpoint_is_inspected_pass_by_pass(tiny_quantized: Path) -> None:
    result = CliRunner().invoke(inspect, [str(tiny_quantized)])
    assert result.exit_code == 0, result.output
    assert "recipe w4a8" in result.output and "linears become integers" in result.output
    assert "round_weights: largest output error" in result.output
    card = json.loads(CliRunner().invoke(inspect, [str(tiny_quantized), "--json"]).stdout)
    assert card["recipe"]["name"] == "w4a8" and card["reports"][0]["kind"] == "round_weights"


def test_factors_are_a_table_with_what_was_measured_and_what_is_applied() -> None:
    factors = Factors("expert.3.q_proj", "expert", 3, (1.5, 1.01, 1.1), (1.34986, 1.0, 1.1))
    report = PassReport(
        kind="atm", factors=(factors,), clip=0.3, band=0.03, notes=("warning: 1 of 3 clipped",)
    )
    console = Console(width=120, record=True, file=io.StringIO())
    print_passes([report], console)
    text = console.export_text()
    assert "warning: 1 of 3 clipped" in text and "expert.3.q_proj" in text
    assert "1.500 1.010 1.100" in text and "1.350 1.000 1.100" in text
    assert pass_line(report) == "atm: 3 factors, 1 of them neutral"
    folded = PassReport(kind="smooth", folds=4, equivalence=Equivalence(4, 0.9999999, 1e-6))
    assert "smooth: 4 folds, float actions unchanged on 4 frames" in pass_line(folded)
    assert pass_line(PassReport(kind="correct_output", notes=("35 linears",))) == "correct_output"
