"""What this process may use and has used: cores and memory (Linux; elsewhere what Python knows)."""

from __future__ import annotations

import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_CPUINFO = Path("/proc/cpuinfo")
_VNNI = frozenset({"avx512_vnni", "avx_vnni"})
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_STATUS = Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Memory:
    """Memory of this process in MiB: now, at its peak, and the part of now that is no mapped file."""

    resident_mb: float
    peak_rss_mb: float
    anonymous_mb: float


def physical_cores() -> int:
    """Return how many physical cores this process may run on: affinity and container quota counted.

    Two hardware threads of one core count once: a matrix product gains nothing from the second.
    """
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1
    cores = {_siblings(cpu) for cpu in allowed}
    return max(1, min(len(cores), _quota_cores()))


def _siblings(cpu: int) -> str:
    """Return what is the same for all hardware threads of the core that ``cpu`` is one of."""
    try:
        return (_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quota_cores() -> int:
    """Return the container's CPU quota in cores, rounded up; a large number if there is none."""
    try:
        quota, period = _QUOTA.read_text().split()
        return max(1, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no cgroup v2, or the quota is "max"
        return 1 << 20


def _cpu_fields() -> dict[str, str]:
    """Return what the system says of the first processor, nothing where there is no /proc/cpuinfo."""
    try:
        lines = _CPUINFO.read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}


def saturates_u8s8() -> bool:
    """Return whether sums of uint8 by int8 products may saturate here: x86 without VNNI, or unknown x86.

    There two such products are added in 16 bits (``vpmaddubsw``); VNNI and ARM add in 32 bits.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return _VNNI.isdisjoint(_cpu_fields().get("flags", "").split())


def processor() -> str:
    """Return the processor's name, on x86 Linux with family, model and stepping: virtual ones share names."""
    fields = _cpu_fields()
    if not fields:
        return platform.processor() or platform.machine()
    name = fields.get("model name") or platform.machine()
    numbers = [fields[key] for key in ("cpu family", "model", "stepping") if key in fields]
    return f"{name} ({'/'.join(numbers)})" if numbers else name


def memory() -> Memory | None:
    """Return the memory of this process from /proc, or None where there is no /proc."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    kib = {
        name: int(rest.split()[0])
        for name, _, rest in (line.partition(":") for line in lines)
        if rest.strip().endswith("kB")
    }
    return Memory(kib["VmRSS"] / 1024, kib["VmHWM"] / 1024, kib["RssAnon"] / 1024)


def available_memory_bytes() -> int | None:
    """Return the memory that programs can still take, None where the system does not tell."""
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        return None
    return None
