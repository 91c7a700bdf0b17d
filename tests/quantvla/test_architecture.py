"""The import arrows: cli -> export -> core -> runtime, and nothing back."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantvla.families import FAMILIES

ROOT = Path(__file__).parents[2]
LAYERS = {
    "runtime": ("quantvla.runtime",),
    "calib_sets": ("quantvla.calib_sets", "quantvla.runtime"),
    "quantvla/passes": (
        "quantvla.passes",
        "quantvla.runtime",
        "quantvla.plan",
        "quantvla.progress",
        "quantvla.quantized_linear",
        "quantvla.quantizer",
        "quantvla.second_order",
        "quantvla.float_weights",
        "quantvla.rotation",
        "quantvla.statistics",
        "quantvla.structure",
        "quantvla.schemes",
    ),
    "export": (
        "quantvla.export",
        "quantvla.runtime",
        "quantvla.activation_scales",
        "quantvla.plan",
        "quantvla.roofline",
        "quantvla.statistics",
        "quantvla.target_plan",
        "quantvla.families",
        "quantvla.checkpoint",
        "quantvla.latency_table",
        "quantvla.progress",
        "quantvla.quantized_linear",
        "quantvla.quantizer",
        "quantvla.schedule",
        "quantvla.schemes",
        "quantvla.versions",
    ),
}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("folder", LAYERS)
def test_a_layer_imports_only_layers_below_it(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for name in imports(path):
            if name.startswith("quantvla."):
                assert name.startswith(LAYERS[folder]), f"{path.name} imports {name}"


def test_core_and_runtime_never_import_the_command_line() -> None:
    for path in ROOT.glob("quantvla/**/*.py"):
        if path.parent.name != "cli" and path.name not in ("__main__.py",):
            assert not any(name.startswith("quantvla.cli") for name in imports(path)), path


PUBLISHED = "known_shapes.py"  # data: shapes and figures of released models


@pytest.mark.parametrize(
    "pattern",
    [
        "quantvla/*.py",
        "quantvla/passes/**/*.py",
        "quantvla/fidelity/**/*.py",
        "quantvla/mixed/**/*.py",
        "quantvla/report/**/*.py",
        "export/**/*.py",
        "runtime/**/*.py",
        "calib_sets/**/*.py",
    ],
)
def test_no_family_is_named_outside_its_file(pattern: str) -> None:
    paths = [path for path in ROOT.glob(pattern) if path.name != PUBLISHED]
    assert paths
    for path in paths:
        text = path.read_text().lower()
        for name in FAMILIES:
            assert name not in _without_comments(text), f"{path} names family {name}"


def test_a_family_is_one_module_and_one_line_of_the_table() -> None:
    """Its file or folder is imported by the table, and by what makes tiny checkpoints; families do not import each other."""
    folder = ROOT / "quantvla" / "families"
    shared = {
        "base", "blocks", "lerobot_checkpoint", "lerobot_interface", "prefix_cache", "qwen3_vl",
    }  # fmt: skip
    found = (*folder.glob("*.py"), *(path.parent for path in folder.glob("*/__init__.py")))
    files = {path.stem for path in found} - {"__init__"} - shared
    for path in ROOT.glob("quantvla/**/*.py"):
        named = {name.removeprefix("quantvla.families.").split(".")[0] for name in imports(path)}
        if path != folder / "__init__.py" and path.parent.name != "testing":
            assert not named & (files - {path.parent.name}), path
    table = set(imports(folder / "__init__.py"))
    assert {f"quantvla.families.{name}" for name in files} <= table


def _without_comments(text: str) -> str:
    return "\n".join(line.split("#")[0] for line in text.splitlines())
