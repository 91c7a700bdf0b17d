"""GOP/s of the own integer kernels on one thread, quantization of the input included: a row a shape, a column a format.

python benchmarks/cpu/kernels.py [INSTRUCTION_SET]        # avx512-vnni, avx2, portable, neon-i8mm, neon-dot
"""

from __future__ import annotations

import ctypes
import sys
import time

import numpy as np

from quantvla.runtime.kernels import available

SHAPES = ((1024, 768, 3072), (1024, 3072, 768), (177, 960, 2560), (50, 720, 2048), (50, 2048, 720))
FORMATS = (
    (8, 16),
    (8, 64),
    (8, 240),
    (8, 256),
    (4, 16),
    (4, 32),
    (4, 48),
    (4, 64),
    (4, 128),
    (4, 240),
)
ROUNDS = 12


def gops(
    library: ctypes.CDLL, name: str, shape: tuple[int, int, int], bits: int, block: int
) -> float:
    """Return the rate of the fastest of several calls."""
    rows, columns, out = shape
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, columns)).astype(np.float32)
    codes = rng.integers(0, 256, out * columns * bits // 8, dtype=np.uint8)
    scales = np.full(out * columns // block, 2.0**-8, np.float16)
    y = np.empty((rows, out), np.float32)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (x, codes, scales, y)]
    best = np.inf
    for _ in range(ROUNDS):
        start = time.perf_counter()
        status = library.quantvla_linear(
            name.encode(), pointers[0], rows, pointers[1], pointers[2], bits, columns, out, block,
            None, None, 0, 0, pointers[3],
        )  # fmt: skip
        best = min(best, time.perf_counter() - start)
        if status != 0:
            raise SystemExit(f"this processor has no kernels called {name!r}")
    return 2 * rows * columns * out / best / 1e9


def main() -> None:
    """Print the table as Markdown."""
    found = available()
    if found.library is None:
        raise SystemExit(found.describe())
    name = sys.argv[1] if len(sys.argv) > 1 else found.linear
    library = ctypes.CDLL(str(found.library))
    print(f"| {name} | " + " | ".join(f"{bits} bits, {block}" for bits, block in FORMATS) + " |")
    print("|---" * (len(FORMATS) + 1) + "|")
    for shape in SHAPES:
        cells = [
            f"{gops(library, name, shape, bits, block):.0f}" if shape[1] % block == 0 else ""
            for bits, block in FORMATS
        ]
        print(f"| {shape[0]} x {shape[1]} -> {shape[2]} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
