"""The base install: the wheel without extras in an empty environment runs an engine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import quantvla

ROOT = Path(quantvla.__file__).resolve().parent.parent
RUN = """
import importlib.util, json, sys
for name in ("torch", "onnx", "lerobot", "transformers"):
    assert importlib.util.find_spec(name) is None, f"{name} came with the base install"
import numpy as np
from quantvla.runtime.policy import Policy
with Policy.from_pretrained(sys.argv[1]) as policy:
    noise = np.ones(policy.manifest.sampler.noise_shape, np.float32)
    print(json.dumps(policy.predict_action_chunk(policy.blank_observation(), noise=noise).tolist()))
"""


def _candidates() -> Iterator[str]:
    found = shutil.which("python3.10")
    if found:
        yield found
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    yield from map(str, sorted(pyenv.glob("versions/3.10*/bin/python")))


def _oldest_python() -> str:
    """Return a Python 3.10 if this machine has one that works, else the running one."""
    for candidate in _candidates():
        check = "import sys, venv, ensurepip; raise SystemExit(sys.version_info[:2] != (3, 10))"
        if subprocess.run([candidate, "-c", check], capture_output=True).returncode == 0:
            return candidate
    return sys.executable


def _run(*command: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _copy_source(target: Path) -> Path:
    """Copy what a wheel is built from, so that building leaves nothing in the working tree."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
    target.mkdir()
    for name in ("quantvla", "export", "runtime", "calib_sets"):
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignore)
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, target / name)
    return target


@pytest.mark.slow
def test_wheel_without_extras_runs_an_engine(pristine_engine: Path, tmp_path: Path) -> None:
    source = _copy_source(tmp_path / "source")
    _run(_oldest_python(), "-m", "venv", tmp_path / "env", cwd=tmp_path)
    scripts = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    pip = (python, "-m", "pip", "--disable-pip-version-check", "--quiet")
    _run(*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path / "wheel", source, cwd=tmp_path)
    (wheel,) = (tmp_path / "wheel").glob("quantvla-*.whl")
    shutil.rmtree(source)
    _run(*pip, "install", wheel, cwd=tmp_path)

    actions = json.loads(_run(python, "-c", RUN, pristine_engine, cwd=tmp_path))
    assert len(actions) == 4 and len(actions[0]) == 2
    report = json.loads(
        _run(
            scripts / "quantvla", "bench", pristine_engine, "--json", "--repeats", "3", cwd=tmp_path
        )
    )
    assert report["versions"]["quantvla"] == quantvla.__version__
    own = report["versions"]["kernels"].startswith("own, ")  # they came with the wheel
    assert own == bool(shutil.which("g++") or shutil.which("clang++"))
    serve = subprocess.run(
        [scripts / "quantvla", "serve", pristine_engine], capture_output=True, text=True
    )
    assert serve.returncode == 2 and "pip install 'quantvla[serve]'" in serve.stderr
