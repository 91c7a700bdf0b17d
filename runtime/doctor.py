"""Is this machine ready to build and run an engine? What is there, what is missing, what to do."""

from __future__ import annotations

import grp
import importlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from quantvla.runtime.cuda_device import cuda_bindings
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.gpu import Gpu, find_gpu
from quantvla.runtime.manifest import Manifest, check_files, read_manifest
from quantvla.runtime.site_formats import read_formats
from quantvla.runtime.targets import TARGETS, Target, target_serving
from quantvla.runtime.tensorrt_library import load_library
from quantvla.runtime.tensorrt_plans import Machine, find_machine, read_record

Status = Literal["ok", "warn", "fail"]
_RUNTIME = ("numpy", "msgspec", "safetensors", "tokenizers", "PIL", "click", "rich", "onnxruntime")
_LOW_MEMORY_BYTES, _LOW_DISK_BYTES = 2 << 30, 4 << 30


class Check(msgspec.Struct, frozen=True):
    """One question: what was found, and what to do unless it is ok."""

    name: str
    status: Status
    found: str
    remedy: str = ""


def _run(command: Sequence[str]) -> str | None:
    """Return what a command prints, None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


@dataclass(frozen=True)
class Host:
    """The machine that is looked at; tests give another one."""

    root: Path = Path("/")
    run: Callable[[Sequence[str]], str | None] = _run
    gpu: Callable[[], Gpu] = find_gpu
    python: tuple[int, int] = sys.version_info[:2]

    def read(self, path: str) -> str | None:
        """Return a file's text, None if it cannot be read."""
        try:
            return (self.root / path).read_text()
        except OSError:
            return None


def examine(engine: Path | None = None, host: Host = Host()) -> tuple[Check, ...]:
    """Return all checks of the machine, and of ``engine`` if one is given."""
    checks = [_python(host), _packages(), _jetpack(host)]
    gpu, found = _gpu(host)
    checks += [
        found,
        _cuda_python(),
        *_power(host),
        _memory(host),
        _disk(engine, host),
        _permissions(host),
    ]
    manifest = None
    if engine is not None:
        manifest, check = _engine(engine)
        checks.append(check)
    target = TARGETS.get(manifest.target) if manifest is not None else _target_of(gpu)
    if target is not None:
        checks.append(_tensorrt(target))
        if engine is not None and manifest is not None and gpu is not None:
            checks.append(_plans(engine, manifest, target, gpu))
    return tuple(checks)


def _python(host: Host) -> Check:
    found = ".".join(map(str, host.python)) + f" on {platform.machine()}"
    if host.python < (3, 10):
        return Check("python", "fail", found, "use Python 3.10 or newer")
    return Check("python", "ok", found)


def _packages() -> Check:
    missing = []
    for name in _RUNTIME:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        return Check(
            "packages", "fail", f"missing {', '.join(missing)}", "pip install the quantvla wheel"
        )
    return Check("packages", "ok", "all of the runtime install")


def _jetpack(host: Host) -> Check:
    release = host.read("etc/nv_tegra_release")
    if release is None:
        return Check("jetpack", "ok", "not a Jetson")
    words = release.replace(",", " ").split()
    major = words[words.index("R36") if "R36" in words else 1].lstrip("R")
    found = f"L4T {' '.join(release.split()[1:5])}"
    if not major.isdigit() or int(major) < 36:
        return Check("jetpack", "fail", found, "flash JetPack 6.1 or newer")
    return Check("jetpack", "ok", found)


def _gpu(host: Host) -> tuple[Gpu | None, Check]:
    try:
        gpu = host.gpu()
    except QuantVLAError as error:
        return None, Check(
            "gpu", "fail", str(error), "install the driver, or run this on the robot"
        )
    found = f"{gpu.name}, SM{gpu.compute_capability}, {gpu.memory_bytes / 2**30:.1f} GiB, CUDA {gpu.cuda}"
    if _target_of(gpu) is None:
        return gpu, Check("gpu", "fail", found, "no target serves it (see `quantvla targets`)")
    return gpu, Check("gpu", "ok", found)


def _target_of(gpu: Gpu | None) -> Target | None:
    return None if gpu is None else target_serving(gpu.compute_capability)


def _cuda_python() -> Check:
    try:
        bindings = cuda_bindings()
    except QuantVLAError as error:
        return Check(
            "cuda-python",
            "fail",
            str(error),
            "pip install cuda-bindings of your CUDA's major version",
        )
    return Check("cuda-python", "ok", bindings.__name__)


def _tensorrt(target: Target) -> Check:
    try:
        library = load_library(target.library)
    except QuantVLAError as error:
        return Check("tensorrt", "fail", str(error), f"target {target.name} needs it")
    wanted = ".".join(map(str, target.version))
    if library.release < target.version:
        return Check(
            "tensorrt", "fail", library.version, f"target {target.name} needs {wanted} or newer"
        )
    return Check("tensorrt", "ok", f"{library.name} {library.version}")


def _power(host: Host) -> list[Check]:
    mode = host.run(("nvpmodel", "-q"))
    if mode is None:
        return []
    name = next(
        (line.split(":")[1].strip() for line in mode.splitlines() if "NV Power Mode" in line), "?"
    )
    fast = name.upper().startswith("MAXN")
    checks = [
        Check("power mode", "ok", name) if fast
        else Check("power mode", "warn", name, "sudo nvpmodel -m 0 for the published rates")
    ]  # fmt: skip
    clocks = host.run(("jetson_clocks", "--show"))
    if clocks is None:
        return [*checks, Check("clocks", "warn", "unknown", "run doctor with sudo to read them")]
    line = next((text for text in clocks.splitlines() if text.startswith("GPU")), "")
    fields = dict(part.split("=", 1) for part in line.split() if "=" in part)
    fixed = fields.get("MinFreq") == fields.get("MaxFreq") and "MinFreq" in fields
    if fixed:
        return [*checks, Check("clocks", "ok", f"fixed at {fields['MaxFreq']} Hz")]
    return [
        *checks,
        Check("clocks", "warn", "GPU clock scales", "sudo jetson_clocks for a steady latency"),
    ]


def _memory(host: Host) -> Check:
    text = host.read("proc/meminfo")
    lines = dict(line.split(":", 1) for line in (text or "").splitlines() if ":" in line)
    if "MemAvailable" not in lines:
        return Check("memory", "warn", "unknown", "")
    available = int(lines["MemAvailable"].split()[0]) << 10
    swap = int(lines.get("SwapTotal", "0").split()[0]) << 10
    found = f"{available / 2**30:.1f} GiB available, {swap / 2**30:.1f} GiB swap"
    if available + swap < _LOW_MEMORY_BYTES:
        return Check("memory", "warn", found, "close other programs or add swap before building")
    return Check("memory", "ok", found)


def _disk(engine: Path | None, host: Host) -> Check:
    where = engine if engine is not None and engine.exists() else host.root
    free = shutil.disk_usage(where).free
    found = f"{free / 2**30:.1f} GiB free"
    if free < _LOW_DISK_BYTES:
        return Check("disk", "warn", found, "plans need about the size of the engine once more")
    return Check("disk", "ok", found)


def _permissions(host: Host) -> Check:
    devices = [
        p for p in ("dev/nvmap", "dev/nvhost-gpu", "dev/nvidia0") if (host.root / p).exists()
    ]
    closed = [p for p in devices if not os.access(host.root / p, os.R_OK | os.W_OK)]
    if closed:
        groups = {grp.getgrgid(gid).gr_name for gid in os.getgroups()}
        lacking = sorted({"video", "render"} - groups)
        return Check(
            "permissions", "fail", f"cannot open {', '.join('/' + p for p in closed)}",
            f"sudo usermod -aG {','.join(lacking) or 'video'} $USER, then log in again",
        )  # fmt: skip
    return Check("permissions", "ok", "GPU devices can be opened" if devices else "no GPU devices")


def _engine(engine: Path) -> tuple[Manifest | None, Check]:
    try:
        manifest = read_manifest(engine)
        check_files(engine, manifest)
    except QuantVLAError as error:
        return None, Check("engine", "fail", str(error), "copy or export it again")
    return manifest, Check(
        "engine", "ok", f"{manifest.family}, {manifest.recipe}, for {manifest.target}"
    )


def _plans(engine: Path, manifest: Manifest, target: Target, gpu: Gpu) -> Check:
    build = f"quantvla build {engine}"
    try:
        library, formats = load_library(target.library), read_formats(engine)
    except QuantVLAError as error:
        return Check("plans", "fail", str(error), build)
    if gpu.compute_capability not in formats.compute_capabilities:
        planned = ", ".join(f"SM{sm}" for sm in formats.compute_capabilities)
        return Check("plans", "fail", f"engine planned for {planned}", "export it for this board")
    here = Machine(library.name, library.version, gpu.compute_capability, gpu.name)
    record = read_record(engine, find_machine(engine, here))
    missing = [stage.name for stage in manifest.stages if record.stage(stage.name) is None]
    if missing:
        return Check("plans", "warn", f"not built: {', '.join(missing)}", build)
    return Check("plans", "ok", f"built for {here.key}")
