"""The archive for the robot: what is in it, that it checks itself, and that it is the same each time."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest
import trt_engine
from tiny_engine import write_engine

from quantvla.deploy.package import SCRIPTS, write_package
from quantvla.runtime.errors import QuantVLAError

zstandard = pytest.importorskip("zstandard")


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    made = trt_engine.write_trt_engine(tmp_path / "engine")
    (made / "plans" / "sm89").mkdir(parents=True)
    (made / "plans" / "sm89" / "vision.plan").write_bytes(b"of one GPU")
    return made


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "quantvla-0-py3-none-any.whl"
    path.write_bytes(b"wheel")
    return path


def unpack(archive: Path, directory: Path) -> Path:
    data = zstandard.ZstdDecompressor().decompress(archive.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(data)) as members:
        members.extractall(directory, filter="data")
    return directory / archive.name.removesuffix(".tar.zst")


def test_the_archive_has_all_a_robot_needs_and_checks_itself(
    engine: Path, wheel: Path, tmp_path: Path
) -> None:
    write_package(engine, tmp_path / "pick.tar.zst", wheel=wheel)
    root = unpack(tmp_path / "pick.tar.zst", tmp_path / "robot")
    present = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
    assert {*SCRIPTS, "SHA256SUMS", f"wheel/{wheel.name}", "engine/manifest.json"} <= present
    assert not any("plan" in Path(name).suffix for name in present)
    assert all((root / name).stat().st_mode & 0o100 for name in ("install.sh", "run.sh"))
    listed = {line.split("  ")[1] for line in (root / "SHA256SUMS").read_text().splitlines()}
    assert listed == present - {"SHA256SUMS"}
    check = ("sha256sum", "--quiet", "--check", "SHA256SUMS")
    assert subprocess.run(check, cwd=root, check=False).returncode == 0
    (root / "engine" / "vision.onnx").write_bytes(b"changed")
    assert subprocess.run(check, cwd=root, check=False, capture_output=True).returncode != 0
    done = subprocess.run([root / "install.sh"], check=False, capture_output=True)
    assert done.returncode != 0  # a damaged package does not get as far as Python


def test_the_same_engine_gives_the_same_archive(engine: Path, wheel: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_package(engine, tmp_path / name / "p.tar.zst", wheel=wheel)
    first, second = ((tmp_path / name / "p.tar.zst").read_bytes() for name in ("a", "b"))
    assert first == second


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name.endswith(".sh")])
def test_the_scripts_are_valid_bash(script: str) -> None:
    from importlib.resources import files

    path = str(files("quantvla.deploy") / script)
    assert subprocess.run(("bash", "-n", path), check=False).returncode == 0


def test_the_scripts_find_the_target_of_a_manifest(engine: Path) -> None:
    """install.sh and the Dockerfile read it with sed, before there is a Python environment."""
    expression = r's/^ *"target": "\(.*\)",$/\1/p'
    command = ("sed", "-n", expression, str(engine / "manifest.json"))
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "rtx\n"


def test_run_says_what_to_do_first(engine: Path, wheel: Path, tmp_path: Path) -> None:
    write_package(engine, tmp_path / "p.tar.zst", wheel=wheel)
    root = unpack(tmp_path / "p.tar.zst", tmp_path / "robot")
    done = subprocess.run([root / "run.sh"], check=False, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: run ./install.sh first\n"


def test_what_cannot_be_packed_is_refused(engine: Path, wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantVLAError, match=r"expected a name that ends in \.tar\.zst"):
        write_package(engine, tmp_path / "p.zip", wheel=wheel)
    with pytest.raises(QuantVLAError, match=r"none.whl: no such wheel"):
        write_package(engine, tmp_path / "p.tar.zst", wheel=tmp_path / "none.whl")
    cpu = write_engine(tmp_path / "cpu")
    with pytest.raises(QuantVLAError, match=r"not an engine for TensorRT \(no formats.json\)"):
        write_package(cpu, tmp_path / "p.tar.zst", wheel=wheel)
    (engine / "prefix.onnx").write_bytes(b"x")
    with pytest.raises(QuantVLAError, match=r"prefix.onnx: checksum mismatch"):
        write_package(engine, tmp_path / "p.tar.zst", wheel=wheel)
