"""All number formats in one policy, through checkpoint, engine, verification and inspection."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from quantvla.calib_sets import open_set
from quantvla.checkpoint import load_quantized
from quantvla.cli.inspect import inspect
from quantvla.export.engine import export_engine
from quantvla.export.integers import integer_sites
from quantvla.passes.base import PassReport, Subject
from quantvla.passes.round_weights import RoundWeights
from quantvla.progress import Progress
from quantvla.quantize import quantize
from quantvla.quantizer import QuantizedWeight
from quantvla.recipe import Recipe, read_recipe
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.manifest import read_manifest
from quantvla.verify import verify

RULES = (
    ('part = ["vision"]\nrole = ["attention"]', "w8a8", 16),
    ('part = ["vision"]\nrole = ["mlp"]', "w8a8-dynamic", 16),
    ('part = ["connector"]', "w8a16", 32),
    ('part = ["llm"]', "w4a8", 32),
    ('part = ["expert"]\nrole = ["mlp"]', "w4a16", 32),
)


@pytest.fixture(scope="module")
def every_format(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    path = tmp_path_factory.mktemp("recipe") / "every.toml"
    rules = "".join(
        f'[[rules]]\n{selector}\nscheme = "{scheme}"\nblock = [{block}, 16]\nreason = "test"\n'
        for selector, scheme, block in RULES
    )
    path.write_text(
        f'name = "every"\n{rules}[default]\nscheme = "float"\nreason = "rest"\n'
        '[[passes]]\nkind = "round_weights"\n'
    )
    return read_recipe(str(path))


@pytest.fixture(scope="module")
def quantized(
    every_format: Recipe,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_checkpoint: Path,
    tiny_set: Path,
) -> Path:
    output = tmp_path_factory.mktemp("formats") / "every"
    quantize(tiny_checkpoint, open_set(tiny_set).part("calibration"), every_format, output)
    return output


@pytest.fixture(scope="module")
def engine(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("formats") / "engine"
    export_engine(quantized, "cpu", output)
    return output


def test_integers_and_biases_survive_in_every_format(quantized: Path, engine: Path) -> None:
    loaded, card = load_quantized(quantized)
    sites = {site.site: site for site in integer_sites(engine, read_manifest(engine))}
    assert sites.keys() == {entry.site for entry in card.plan.quantized}
    assert {entry.scheme.name for entry in card.plan.quantized} == {rule[1] for rule in RULES}
    for entry in card.plan.quantized:
        module: Any = loaded.policy.get_submodule(entry.site)
        found = sites[entry.site]
        expected = module.quantized
        assert torch.equal(found.weight.codes, expected.codes)
        assert torch.equal(found.weight.scales, expected.scales)
        assert (found.weight.bits, found.weight.block, found.weight.inputs) == (
            expected.bits, expected.block, expected.inputs,
        )  # fmt: skip
        assert found.stored_bytes == entry.bytes_after
        assert (found.bias is None) == (module.bias is None)
        if module.bias is not None and found.bias is not None:
            assert torch.equal(found.bias, module.bias)


def test_verification_compares_every_kernel_with_its_own_arithmetic(
    engine: Path, tiny_float_engine: Path, tiny_checkpoint: Path, tiny_set: Path
) -> None:
    report = verify(
        engine,
        tiny_checkpoint,
        open_set(tiny_set).part("heldout"),
        float_engine=tiny_float_engine,
    )
    assert report.passed, report
    assert report.kernel.max_abs < 1e-4
    assert report.quantization.nrmse > 1e-4


def test_inspect_counts_linears_and_bytes_by_format(quantized: Path, engine: Path) -> None:
    _, card = load_quantized(quantized)
    result = CliRunner().invoke(inspect, [str(engine), "--json"])
    formats = json.loads(result.stdout)["formats"]
    planned = Counter((entry.stage, entry.scheme.name) for entry in card.plan.quantized)
    found: Counter[tuple[str, str]] = Counter()
    for row in formats:
        found[(row["stage"], row["scheme"])] += row["sites"]
    assert found == planned
    assert sum(row["bytes"] for row in formats) == sum(
        entry.bytes_after for entry in card.plan.quantized
    )
    shown = CliRunner().invoke(inspect, [str(engine)]).output
    assert "integer linears" in shown and "w8a8-dynamic" in shown


def test_a_pass_that_writes_another_format_than_planned_is_stopped(
    every_format: Recipe,
    tiny_checkpoint: Path,
    tiny_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forgetful(self: RoundWeights, subject: Subject, progress: Progress) -> PassReport:
        for entry in subject.plan.quantized:
            rows, columns = entry.out_features, entry.in_features
            blocks = columns // entry.scheme.block
            subject.weights.put(
                entry.site,
                QuantizedWeight(
                    torch.zeros(rows, columns, dtype=torch.int8),
                    torch.ones(rows, blocks, dtype=torch.float16),
                    entry.scheme.weight_bits,
                    entry.scheme.block,
                ),
            )
        return PassReport(kind="round_weights", sites=())

    monkeypatch.setattr(RoundWeights, "__call__", forgetful)
    with pytest.raises(
        QuantVLAError,
        match=r"left another format than the planned w8a8-dynamic .* got 8 bits, block 48, inputs int8_block",
    ):
        quantize(
            tiny_checkpoint,
            open_set(tiny_set).part("calibration"),
            every_format,
            tmp_path / "out",
        )
