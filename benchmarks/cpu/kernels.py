"""GOP/s of the own integer kernels on one thread, quantization of the input included: a row a shape, a column a format.

python benchmarks/cpu/kernels.py [INSTRUCTION_SET]        # avx512-vnni, avx2, portable, neon-i8mm, neon-dot
python benchmarks/cpu/kernels.py --peers RESULT.json      # 4-bit ones against ONNX Runtime's dynamic 8-bit product, in turns
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from roofline import best_s, product

from quantvla.runtime.kernels import available
from quantvla.runtime.machine import processor

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
PEER_ROWS, PEER_SHAPE, PEER_BLOCKS, PEER_ROUNDS = (50, 256, 1024), (960, 2560), (240, 32), 40


def linear(
    library: ctypes.CDLL, name: str, shape: tuple[int, int, int], bits: int, block: int
) -> Callable[[], None]:
    """Return a call of the kernels called ``name`` on a random linear layer (rows, in, out)."""
    rows, columns, out = shape
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, columns)).astype(np.float32)
    codes = rng.integers(0, 256, out * columns * bits // 8, dtype=np.uint8)
    scales = np.full(out * columns // block, 2.0**-8, np.float16)
    y = np.empty((rows, out), np.float32)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (x, codes, scales, y)]

    def call() -> None:
        status = library.quantvla_linear(
            name.encode(), pointers[0], rows, pointers[1], pointers[2], bits, columns, out, block,
            None, None, 0, 0, pointers[3],
        )  # fmt: skip
        if status != 0:
            raise SystemExit(f"this processor has no kernels called {name!r}")

    call()
    call.arrays = (x, codes, scales, y)  # type: ignore[attr-defined]  # pointers do not keep them
    return call


def gops(shape: tuple[int, int, int], duration_s: float) -> float:
    """Return the rate of a linear layer (rows, in, out)."""
    return 2 * math.prod(shape) / duration_s / 1e9


def peers(library: ctypes.CDLL, name: str) -> list[dict[str, float]]:
    """Return the rate of 4-bit kernels and of ``DynamicQuantizeMatMul``, one thread, by rows and block."""
    found = []
    for rows in PEER_ROWS:
        shape = (rows, *PEER_SHAPE)
        rng = np.random.default_rng(0)
        x = rng.standard_normal(shape[:2], np.float32)
        weight = rng.integers(-127, 128, PEER_SHAPE, np.int8)
        scales = np.full(shape[2], 0.01, np.float32)
        theirs = product(1, "DynamicQuantizeMatMul", "com.microsoft", [weight, scales], x)
        ours = [linear(library, name, shape, 4, block) for block in PEER_BLOCKS]
        peer_s, *own_s = best_s([theirs, *ours], PEER_ROUNDS, time.thread_time)
        for block, duration_s in zip(PEER_BLOCKS, own_s, strict=True):
            entry = {
                "rows": rows, "block": block, "own_gops": round(gops(shape, duration_s), 1),
                "onnxruntime_gops": round(gops(shape, peer_s), 1), "ratio": round(peer_s / duration_s, 3),
            }  # fmt: skip
            print(entry)
            found.append(entry)
    return found


def main() -> None:
    """Print the table as Markdown."""
    found = available()
    if found.library is None:
        raise SystemExit(found.describe())
    library = ctypes.CDLL(str(found.library))
    if sys.argv[1:2] == ["--peers"]:
        result = {"processor": processor(), "kernels": found.describe(), "onnxruntime": version("onnxruntime"),
                  "in_features": PEER_SHAPE[0], "out_features": PEER_SHAPE[1], "rates": peers(library, found.linear)}  # fmt: skip
        Path(sys.argv[2]).write_text(json.dumps(result, indent=1) + "\n")
        return
    name = sys.argv[1] if len(sys.argv) > 1 else found.linear
    print(f"| {name} | " + " | ".join(f"{bits} bits, {block}" for bits, block in FORMATS) + " |")
    print("|---" * (len(FORMATS) + 1) + "|")
    for shape in SHAPES:
        cells = [
            f"{gops(shape, best_s([linear(library, name, shape, bits, block)], ROUNDS, time.thread_time)[0]):.0f}"
            if shape[1] % block == 0
            else ""
            for bits, block in FORMATS
        ]
        print(f"| {shape[0]} x {shape[1]} -> {shape[2]} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
