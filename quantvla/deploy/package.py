"""`quantvla package`: an engine and all that a robot needs to run it, in one archive.

<name>/engine/       the engine directory, without plans: they belong to one GPU and are built there
<name>/wheel/        this package, base install
<name>/              install.sh, run.sh, Dockerfile, quantvla.service, SHA256SUMS over everything

The same engine and wheel give the same bytes.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

import zstandard

import quantvla
from quantvla.runtime.errors import explain
from quantvla.runtime.files import sha256_file, write_atomic
from quantvla.runtime.manifest import Manifest, check_files, read_manifest
from quantvla.runtime.site_formats import read_formats
from quantvla.runtime.tensorrt_plans import PLANS

SUFFIX = ".tar.zst"
SCRIPTS = ("install.sh", "run.sh", "Dockerfile", "quantvla.service")
_SOURCE = ("quantvla", "export", "runtime", "calib_sets")
_LEVEL = 10


def write_package(engine: Path, output: Path, *, wheel: Path | None = None) -> Manifest:
    """Write the archive of an engine for a GPU target to ``output``.

    ``wheel`` None builds this package's own from its source. Raises `QuantVLAError` for an engine
    that is damaged or not for TensorRT, a wrong suffix, or an installation without source.
    """
    if not output.name.endswith(SUFFIX):
        raise explain(output, f"expected a name that ends in {SUFFIX}", remedy="rename it")
    manifest = read_manifest(engine)
    check_files(engine, manifest)
    read_formats(engine)
    with TemporaryDirectory() as directory:
        built = wheel if wheel is not None else build_wheel(Path(directory))
        if not built.is_file():
            raise explain(built, "no such wheel", remedy="give the file that `pip wheel` wrote")
        members = dict(_members(engine, built))
        sums = "".join(f"{sha256_file(path)}  {name}\n" for name, path in sorted(members.items()))
        root = output.name.removesuffix(SUFFIX)
        write_atomic(output, _archive(root, members, sums.encode()))
    return manifest


def _members(engine: Path, wheel: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(engine.rglob("*")):
        relative = path.relative_to(engine)
        if path.is_file() and relative.parts[0] != PLANS:
            yield f"engine/{relative.as_posix()}", path
    yield f"wheel/{wheel.name}", wheel
    for name in SCRIPTS:
        yield name, Path(str(files("quantvla.deploy") / name))


def _archive(root: str, members: dict[str, Path], sums: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, path in sorted(members.items()):
            _add(archive, f"{root}/{name}", path.read_bytes(), executable=name.endswith(".sh"))
        _add(archive, f"{root}/SHA256SUMS", sums, executable=False)
    return zstandard.ZstdCompressor(level=_LEVEL).compress(buffer.getvalue())


def _add(archive: tarfile.TarFile, name: str, data: bytes, *, executable: bool) -> None:
    entry = tarfile.TarInfo(name)  # owner and time stay 0: the same content gives the same bytes
    entry.size, entry.mode = len(data), 0o755 if executable else 0o644
    archive.addfile(entry, io.BytesIO(data))


def build_wheel(directory: Path) -> Path:
    """Build this package's wheel in ``directory`` from its source and return it."""
    root = Path(quantvla.__file__).resolve().parent.parent
    if not (root / "setup.cfg").is_file():
        raise explain(
            "quantvla", "is installed without its source, so its wheel cannot be built here",
            remedy="pass --wheel with the file you installed it from",
        )  # fmt: skip
    source = directory / "source"
    source.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in _SOURCE:
        shutil.copytree(root / name, source / name, symlinks=True, ignore=ignore)
    for name in ("setup.cfg", "pyproject.toml", "README.md"):
        shutil.copy(root / name, source / name)
    command = [
        sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "wheel", "--no-deps",
        "--no-build-isolation", "--wheel-dir", str(directory / "wheel"), str(source),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise explain(
            "wheel", "could not be built", got=done.stderr.strip().splitlines()[-1:],
            remedy="pip install setuptools, or pass --wheel",
        )  # fmt: skip
    (wheel,) = (directory / "wheel").glob("quantvla-*.whl")
    return wheel
