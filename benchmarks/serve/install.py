"""What the base install takes on a robot: size on disk, packages, and import time, in an empty environment.

    python benchmarks/serve/install.py                  # a few minutes, most of them downloading
    python benchmarks/serve/install.py --python python3.10

Writes install.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import quantvla
from quantvla.runtime.files import write_atomic

ROOT = Path(quantvla.__file__).resolve().parent.parent
PARTS = (
    "quantvla", "export", "runtime", "calib_sets", "setup.cfg", "setup.py", "pyproject.toml", "README.md",
)  # fmt: skip
IMPORTS = {
    "python alone": "pass",
    "quantvla.runtime.policy": "import quantvla.runtime.policy",
    "quantvla.runtime.policy and the engine library": "import quantvla.runtime.policy, onnxruntime",
    "quantvla.runtime.serve.client": "import quantvla.runtime.serve.client",
}
REPEATS = 5


def run(*command: str | Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [str(part) for part in command],
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout


def wheel_of(folder: Path, python: Path) -> Path:
    """Build the wheel from a copy, so that building leaves nothing in the working tree."""
    source = folder / "source"
    source.mkdir()
    for name in PARTS:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, source / name)
    run(python, "-m", "pip", "-q", "wheel", "--no-deps", "--wheel-dir", folder / "wheel", source)
    (wheel,) = (folder / "wheel").glob("quantvla-*.whl")
    return wheel


def size_mib(path: Path) -> float:
    files = (p for p in path.rglob("*") if p.is_file() and not p.is_symlink())
    return round(sum(p.stat().st_size for p in files) / (1 << 20), 1)


def seconds_of(python: Path, code: str) -> tuple[float, float]:
    """Return median wall and processor time of a fresh interpreter that runs ``code``, caches warm.

    Unlike the wall time, the processor time does not grow with the load of the machine.
    """
    times = []
    for _ in range(REPEATS + 1):
        started, used = time.perf_counter(), os.times()
        run(python, "-c", code)
        now = os.times()
        cpu = now.children_user + now.children_system - used.children_user - used.children_system
        times.append((time.perf_counter() - started, cpu))
    wall, cpu_times = zip(*times[1:], strict=True)
    return round(median(wall), 3), round(median(cpu_times), 3)


def packages(python: Path) -> dict[str, str]:
    listed = json.loads(run(python, "-m", "pip", "list", "--format", "json"))
    return {row["name"]: row["version"] for row in listed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(__file__).with_name("install.json")
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(options.python, "-m", "venv", folder / "env")
        python = folder / "env" / "bin" / "python"
        empty_mib = size_mib(folder / "env")
        wheel = wheel_of(folder, python)
        run(python, "-m", "pip", "-q", "install", wheel)
        base, installed_mib = packages(python), size_mib(folder / "env")
        run(python, "-m", "pip", "-q", "install", f"{wheel}[serve]")
        serve_mib = size_mib(folder / "env")
        result = {
            "python": run(python, "-V").strip(),
            "wheel_kib": round(wheel.stat().st_size / 1024, 1),
            "base_install_mib": round(installed_mib - empty_mib, 1),
            "serve_extra_mib": round(serve_mib - installed_mib, 1),
            "packages": base,
            "import_wall_and_cpu_s": {
                what: seconds_of(python, code) for what, code in IMPORTS.items()
            },
            "load_average_at_the_end": os.getloadavg()[0],
        }
    write_atomic(options.output, (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
