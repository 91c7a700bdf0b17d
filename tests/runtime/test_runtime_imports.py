"""The runtime needs no torch: by what it imports, and by running where torch cannot be imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import quantvla.runtime

FOLDER = Path(quantvla.runtime.__file__).parent
SOURCES = sorted(FOLDER.rglob("*.py"))
LIBRARIES = {"numpy", "msgspec", "safetensors", "tokenizers", "PIL", "onnxruntime"}
EXTRA_LIBRARIES = {
    "serve": {"websockets", "prometheus_client"},
    "ros2": {"rclpy", "builtin_interfaces", "sensor_msgs", "std_msgs", "trajectory_msgs"},
}
NEW_IN_311 = {"tomllib", "wsgiref.types"}

BLOCKED_RUN = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "onnx", "lerobot", "transformers", "scipy"}:
            raise ImportError(f"{name} must not be imported")

sys.meta_path.insert(0, Blocker())
import quantvla.runtime.policy, quantvla.runtime.bench, quantvla.runtime.control.replay
import quantvla.cli.run, quantvla.cli.replay, quantvla.robots.recorded
assert "onnxruntime" not in sys.modules, "the engine library must be loaded lazily"
from quantvla.runtime.policy import Policy
with Policy.from_pretrained(sys.argv[1], threads=1) as policy:
    policy.warm_up()
"""


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_only_allowed_imports(path: Path) -> None:
    allowed = LIBRARIES | sys.stdlib_module_names | EXTRA_LIBRARIES.get(path.parent.name, set())
    for name in _imports(ast.parse(path.read_text())):
        top = name.partition(".")[0]
        own = name == "quantvla.runtime" or name.startswith("quantvla.runtime.")
        assert own or top in allowed, f"{path.name} imports {name}"
        assert name not in NEW_IN_311, f"{path.name}: {name} is not in Python 3.10"


def test_the_base_install_does_not_need_an_extra() -> None:
    extras = tuple(f"quantvla.runtime.{extra}" for extra in EXTRA_LIBRARIES)
    for path in SOURCES:
        if path.parent.name not in EXTRA_LIBRARIES:
            assert not any(
                name.startswith(extras) for name in _imports(ast.parse(path.read_text()))
            )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_syntax_of_python_310(path: Path) -> None:
    ast.parse(path.read_text(), feature_version=(3, 10))
    assert len(path.read_text().splitlines()) <= 300


def test_runs_where_torch_cannot_be_imported(pristine_engine: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED_RUN, str(pristine_engine)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
