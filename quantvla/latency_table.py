"""How long each kernel takes on this machine: a table, measured once and kept.

A table belongs to one processor, one version of ONNX Runtime and one number of threads. Another
one is never read by mistake: the file's name comes from that key, and the key stands in the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from quantvla.runtime.errors import explain
from quantvla.runtime.files import write_atomic

TABLE_VERSION = 2
"""Raised when the runtime runs a kernel another way: older times are then measured again."""


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What latency depends on besides the kernel."""

    target: str
    processor: str
    engine_library: str
    threads: int

    def describe(self) -> str:
        """Return the machine in words."""
        return f"{self.processor}, {self.engine_library}, {self.threads} threads"


class Kernel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One linear as a kernel sees it: ``shape`` of its input, its output width, bias, format."""

    shape: tuple[int, ...]
    out_features: int
    bias: bool
    format: str

    def describe(self) -> str:
        """Return the kernel as it stands in tables."""
        rows = " x ".join(map(str, self.shape))
        return f"({rows}) -> {self.out_features}{' + bias' if self.bias else ''}, {self.format}"


class KernelTime(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Median duration of one call, in microseconds, by operator that computes the kernel's format.

    Over ``calls`` calls of each; the call of an empty graph is taken off.
    """

    kernel: Kernel
    median_us: dict[str, float]
    calls: int

    @property
    def fastest_us(self) -> float:
        """The duration with the fastest operator."""
        return min(self.median_us.values())


class LatencyTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Measured kernels of one machine."""

    version: int
    machine: Machine
    times: tuple[KernelTime, ...]

    def lookup(self) -> dict[Kernel, float]:
        """Return microseconds by kernel, of the fastest operator."""
        return {time.kernel: time.fastest_us for time in self.times}

    def operators(self) -> dict[Kernel, dict[str, float]]:
        """Return microseconds by kernel and operator."""
        return {time.kernel: time.median_us for time in self.times}

    def missing(self, kernels: Iterable[Kernel]) -> list[Kernel]:
        """Return the kernels that are not measured yet, each once, in order."""
        known = self.lookup()
        return [kernel for kernel in dict.fromkeys(kernels) if kernel not in known]

    def only(self, kernels: Iterable[Kernel]) -> LatencyTable:
        """Return the table with just these kernels, in their order; all must be in it."""
        known = {time.kernel: time for time in self.times}
        return msgspec.structs.replace(self, times=tuple(known[kernel] for kernel in kernels))

    def with_times(self, times: Sequence[KernelTime]) -> LatencyTable:
        """Return the table with more kernels."""
        return msgspec.structs.replace(self, times=(*self.times, *times))


@dataclass(frozen=True)
class TableFile:
    """The file of one machine's table below a cache directory."""

    directory: Path
    machine: Machine

    @property
    def path(self) -> Path:
        """Where the table is."""
        key = hashlib.sha256(msgspec.json.encode((TABLE_VERSION, self.machine))).hexdigest()[:16]
        return self.directory / f"latency-{self.machine.target}-{key}.json"

    def read(self) -> LatencyTable:
        """Return the table, empty if there is none. Raises `QuantVLAError` for another machine's."""
        if not self.path.is_file():
            return LatencyTable(version=TABLE_VERSION, machine=self.machine, times=())
        return read_table(self.path, self.machine)

    def write(self, table: LatencyTable) -> None:
        """Keep the table."""
        write_atomic(self.path, msgspec.json.format(msgspec.json.encode(table), indent=1))


def read_table(path: Path, machine: Machine) -> LatencyTable:
    """Return the table at ``path``; raises `QuantVLAError` unless it was measured on ``machine``."""
    try:
        table = msgspec.json.decode(path.read_bytes(), type=LatencyTable)
        if table.version != TABLE_VERSION:
            raise msgspec.ValidationError(f"version {table.version}, expected {TABLE_VERSION}")
    except FileNotFoundError as error:
        raise explain(path, "no such file", remedy="make it with `quantvla profile -o`") from error
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise explain(
            path,
            f"not a latency table of this version ({error})",
            remedy="remove it and measure again",
        ) from error
    if table.machine != machine:
        raise explain(
            path,
            f"measured on another machine than this one ({machine.describe()})",
            got=table.machine.describe(),
            remedy="measure here with `quantvla profile`",
        )
    return table
