"""The machine as a directory tree: what doctor sees and says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import trt_engine

from quantvla.runtime.doctor import Check, Host, examine
from quantvla.runtime.gpu import Gpu

ORIN = Gpu("Orin", 87, 61 << 30, "12.6")
RELEASE = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n"
CLOCKS = "SOC family:tegra234\nGPU MinFreq={} MaxFreq=1300500000 CurrentFreq=306000000\n"


def jetson(
    root: Path,
    *,
    mode: str = "MAXN",
    low: str = "1300500000",
    release: str = RELEASE,
    gib: int = 50,
) -> Host:
    (root / "etc").mkdir(parents=True)
    (root / "proc").mkdir()
    (root / "etc" / "nv_tegra_release").write_text(release)
    (root / "proc" / "meminfo").write_text(f"MemAvailable: {gib << 20} kB\nSwapTotal: 0 kB\n")

    def run(command: Sequence[str]) -> str | None:
        answers = {"nvpmodel": f"NV Power Mode: {mode}\n0\n", "jetson_clocks": CLOCKS.format(low)}
        return answers.get(command[0])

    return Host(root, run, lambda: ORIN, (3, 10))


def found(checks: tuple[Check, ...], name: str) -> Check:
    return next(check for check in checks if check.name == name)


def test_a_jetson_that_is_set_up(tmp_path: Path) -> None:
    checks = examine(host=jetson(tmp_path))
    for name in (
        "python",
        "packages",
        "jetpack",
        "gpu",
        "power mode",
        "clocks",
        "memory",
        "permissions",
    ):
        assert found(checks, name).status == "ok", found(checks, name)
    assert "R36" in found(checks, "jetpack").found
    assert "SM87" in found(checks, "gpu").found


def test_what_slows_a_jetson_down_is_a_warning_with_its_command(tmp_path: Path) -> None:
    checks = examine(host=jetson(tmp_path, mode="15W", low="306000000", gib=1))
    assert found(checks, "power mode").remedy.startswith("sudo nvpmodel -m 0")
    assert found(checks, "clocks").remedy.startswith("sudo jetson_clocks")
    assert "add swap" in found(checks, "memory").remedy
    assert {found(checks, n).status for n in ("power mode", "clocks", "memory")} == {"warn"}


def test_an_old_jetpack_and_an_old_python_fail(tmp_path: Path) -> None:
    host = jetson(tmp_path, release="# R35 (release), REVISION: 4.1\n")
    checks = examine(host=Host(host.root, host.run, host.gpu, (3, 8)))
    assert found(checks, "jetpack").status == "fail"
    assert found(checks, "python").remedy == "use Python 3.10 or newer"


def test_a_gpu_no_target_serves_fails(tmp_path: Path) -> None:
    host = jetson(tmp_path)
    hopper = Gpu("H100", 90, 80 << 30, "13.0")
    check = found(examine(host=Host(host.root, host.run, lambda: hopper)), "gpu")
    assert check.status == "fail" and "no target serves it" in check.remedy


def test_an_engine_that_is_not_built_says_how(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    engine = trt_engine.write_trt_engine(tmp_path / "engine")
    host = jetson(tmp_path / "root")
    ada = Gpu("Ada", 89, 24 << 30, "13.0")
    checks = examine(engine, Host(host.root, host.run, lambda: ada))
    assert found(checks, "engine").status == found(checks, "tensorrt").status == "ok"
    assert found(checks, "plans").found == "not built: vision, prefix, denoise"
    assert found(checks, "plans").remedy == f"quantvla build {engine}"
    orin = found(examine(engine, host), "plans")
    assert orin.status == "fail" and "planned for SM89" in orin.found
    (engine / "vision.onnx").write_bytes(b"")
    assert found(examine(engine, host), "engine").status == "fail"
