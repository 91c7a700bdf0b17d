"""Versions of what made an artefact."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

_COMPILER_PACKAGES = (
    "quantvla",
    "torch",
    "lerobot",
    "transformers",
    "onnx",
    "onnxruntime",
    "numpy",
)


def compiler_versions() -> dict[str, str]:
    """Return the installed version of every package that influences the compiler's output."""
    return {name: _version(name) for name in _COMPILER_PACKAGES}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
