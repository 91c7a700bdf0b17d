"""Compile the kernels: ``python runtime/kernels/build.py`` writes the shared library beside the sources.

The wheel's build calls it too. It takes a C++17 compiler (``$CXX``, else g++ or clang++) and nothing else; each
instruction set is a file of its own, compiled for that set and used only on processors that have it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent
LIBRARY = "libquantvla_kernels.so"
COMMON = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi",
          "-Wno-maybe-uninitialized", "-ffp-contract=off", "-fno-math-errno")  # fmt: skip
_AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx2 -mfma -mf16c"


@dataclass(frozen=True)
class Unit:
    """One object: a source and the flags of its instruction set."""

    source: str
    flags: str = ""


_EVERYWHERE = (
    Unit("ops.cpp"), Unit("dispatch.cpp"), Unit("linear_portable.cpp"),
    Unit("attention_portable.cpp", "-ffp-contract=fast"),
)  # fmt: skip
UNITS = {
    "x86_64": (
        *_EVERYWHERE,
        Unit("linear_avx512.cpp", _AVX512),
        Unit("attention_avx512.cpp", f"{_AVX512} -mavx512bf16"),
        Unit("linear_avx2.cpp", "-mavx2 -mfma"),
        Unit("attention_avx2.cpp", "-mavx2 -mfma -ffp-contract=fast"),
    ),
    "aarch64": (
        *_EVERYWHERE,
        Unit("linear_neon.cpp", "-march=armv8.2-a+dotprod+i8mm"),
        Unit("linear_neon.cpp", "-march=armv8.2-a+dotprod"),
    ),
}


class BuildError(Exception):
    """The kernels could not be built; the message says why and what follows."""


def compiler() -> str:
    """Return the C++ compiler; raises `BuildError` if there is none."""
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else ("g++", "clang++"):
        found = shutil.which(name)
        if found:
            return found
    raise BuildError(
        f"no C++ compiler found ({wanted or 'g++ or clang++'}); install one (Debian: apt-get install g++) "
        "and build again. Without the kernels engines run on ONNX Runtime's own operators, slower"
    )


def sources_hash() -> str:
    """Return a short hash of all sources and this file."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".cpp", ".h", ".inl", ".py"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def build(
    output: Path, *, machine: str = platform.machine(), extra: Sequence[str] = (), link: Sequence[str] = ("-shared",),
    sources: Sequence[Path] = (),
) -> Path:  # fmt: skip
    """Write the library of ``machine`` to ``output``, whole or not at all, and return it.

    ``extra`` flags go to every compilation and to the link, ``sources`` are compiled besides;
    with other ``link`` flags the output can be a program.
    """
    command = [compiler(), *COMMON, f'-DQUANTVLA_VERSION="{sources_hash()}"', *extra]
    units = [*UNITS.get(machine, _EVERYWHERE), *(Unit(str(path)) for path in sources)]
    with tempfile.TemporaryDirectory() as work:

        def compile_one(index: int) -> str:
            unit = units[index]
            target = f"{work}/{index}.o"
            _run(
                [
                    *command,
                    *unit.flags.split(),
                    "-I",
                    str(SOURCES),
                    "-c",
                    str(SOURCES / unit.source),
                    "-o",
                    target,
                ]
            )
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, range(len(units))))
        made = Path(work) / output.name
        _run([*command, *link, *objects, "-o", str(made)])
        output.parent.mkdir(parents=True, exist_ok=True)
        beside = output.with_name(f".{output.name}.{os.getpid()}")
        shutil.copy2(made, beside)
        beside.replace(output)
    return output


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}: {done.stderr.strip()}")


def is_current(library: Path) -> bool:
    """Whether the library was built from the sources as they are."""
    return library.is_file() and sources_hash().encode() in library.read_bytes()


def main() -> int:
    """Build beside the sources; 0, or 1 with a message."""
    library = SOURCES / LIBRARY
    if "--if-changed" in sys.argv[1:] and is_current(library):
        return 0
    try:
        print(build(library))
    except BuildError as error:
        print(f"kernels not built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
