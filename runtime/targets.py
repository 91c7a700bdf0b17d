"""Where TensorRT engines run: library versions, number formats and the boards' published rates, as data.

A target is a TensorRT version and the GPUs it serves; a board is a product with its memory, bandwidth
and dense peak rates. Everything that plans, checks, builds or estimates for a GPU reads these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantvla.runtime.errors import explain, nearest

UNVERIFIED = "unverified: written from memory, the source was not opened"

_AMPERE = ("fp16", "bf16", "int8", "int4")
FORMATS: Mapping[int, tuple[str, ...]] = {
    75: ("fp16",),
    80: _AMPERE,
    86: _AMPERE,
    87: _AMPERE,
    89: (*_AMPERE, "fp8"),
    110: (*_AMPERE, "fp8", "nvfp4"),
    120: (*_AMPERE, "fp8", "nvfp4"),
    121: (*_AMPERE, "fp8", "nvfp4"),
}
"""Compute capability (major * 10 + minor) -> formats TensorRT multiplies matrices in; int4 is weight-only.

SM75, 86, 89, 120, 121: compared with the TensorRT-RTX 1.5 support matrix, which has no integer products on
SM75. SM80, 87, 110: unverified, written from memory of the TensorRT support matrix.
"""

FORMAT_BITS: Mapping[str, int] = {
    "fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "fp8": 8, "int4": 4, "nvfp4": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A TensorRT and the GPUs it builds for.

    ``version`` is the least (major, minor) of ``library`` that the graphs are written for, ``opset``
    the newest ONNX opset its parser reads; ``verified``: what the library version was compared with.
    """

    name: str
    library: str
    version: tuple[int, int]
    opset: int
    compute_capabilities: tuple[int, ...]
    system: str
    source: str
    verified: str = UNVERIFIED


@dataclass(frozen=True)
class Board:
    """A product. Rates are dense (no sparsity): ``peak_tera_per_s`` multiply-adds count as two operations.

    ``memory_gb`` and ``bandwidth_gb_s`` in 10^9 bytes; ``launch_us`` is the time that one more kernel
    costs inside a CUDA graph, an assumption that nobody publishes. ``source`` says where the vendor gives the
    rates, ``verified`` what they were really compared with.
    """

    name: str
    title: str
    target: str
    compute_capability: int
    memory_gb: float
    bandwidth_gb_s: float
    peak_tera_per_s: Mapping[str, float]
    launch_us: float
    source: str
    verified: str = UNVERIFIED

    def peak(self, number_format: str) -> float:
        """Return the dense peak in operations per second; int4 weights are multiplied in fp16."""
        rate = self.peak_tera_per_s.get("fp16" if number_format == "int4" else number_format)
        if rate is None:
            raise explain(
                f"board {self.name}",
                f"no published rate for {number_format}",
                remedy=f"formats with one: {', '.join(self.peak_tera_per_s)}",
            )
        return rate * 1e12


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target(
            "jetson-orin", "tensorrt", (10, 3), 21, (87,), "JetPack 6 (6.1, 6.2), Python 3.10",
            "NVIDIA JetPack 6.2 release notes: TensorRT 10.3",
            "TensorRT 10.3 by Torch-TensorRT's page on JetPack 6.1 and 6.2; opset unverified",
        ),
        Target(
            "jetson-thor", "tensorrt", (10, 13), 23, (110,), "JetPack 7, Python 3.12",
            "NVIDIA JetPack 7 release notes: TensorRT 10.13",
        ),
        Target(
            "rtx", "tensorrt_rtx", (1, 7), 23, (75, 80, 86, 89, 120, 121), "desktop, Linux or Windows",
            "tensorrt_rtx 1.7: members of ComputeCapability",
            "read from the library, 1.7.1; opset unverified",
        ),
    )
}  # fmt: skip

_ORIN = "NVIDIA Jetson AGX Orin Series technical brief v1.2: sparse rate of the GPU, halved"
BOARDS: Mapping[str, Board] = {
    board.name: board
    for board in (
        Board(
            "agx-orin-64", "Jetson AGX Orin 64 GB (MAXN)", "jetson-orin", 87, 64, 204.8,
            {"fp32": 5.3, "fp16": 42.5, "bf16": 42.5, "int8": 85}, 3.0, _ORIN,
            "fp32 and int8 with a third party's digest of the brief; bandwidth, fp16 and bf16 unverified",
        ),
        Board(
            "orin-nx-16", "Jetson Orin NX 16 GB (25 W)", "jetson-orin", 87, 16, 102.4,
            {"fp32": 1.9, "fp16": 15, "bf16": 15, "int8": 30}, 3.0,
            "NVIDIA Jetson Orin NX Series data sheet: sparse rate of the GPU, halved",
        ),
        Board(
            "orin-nano-8", "Jetson Orin Nano 8 GB (MAXN Super)", "jetson-orin", 87, 8, 102.0,
            {"fp32": 2.1, "fp16": 17, "bf16": 17, "int8": 33}, 3.0,
            "NVIDIA Jetson Orin Nano Super developer kit: 33 dense INT8 TOPS, 17 FP16 TFLOPS",
            "int8 (67 sparse, halved) and bandwidth with a third party's table; fp32, fp16, bf16 unverified",
        ),
        Board(
            "agx-thor", "Jetson AGX Thor T5000", "jetson-thor", 110, 128, 273,
            {"fp32": 8.0, "fp16": 258, "bf16": 258, "int8": 517, "fp8": 517, "nvfp4": 1035}, 2.0,
            "NVIDIA Jetson Thor data sheet: 2070 sparse FP4 TFLOPS, halved for dense and for each wider format",
            "nvfp4 (2070 sparse, halved) with third parties; fp16, bf16, fp8 within 1 % of a third party's count from clocks "
            "(torring.dev); bandwidth, fp32, int8 unverified",
        ),
        Board(
            "rtx-3090", "GeForce RTX 3090", "rtx", 86, 24, 936,
            {"fp32": 35.6, "fp16": 71, "bf16": 71, "int8": 284}, 2.0,
            "NVIDIA Ampere GA102 whitepaper, table 9: FP16 with FP32 accumulation",
        ),
        Board(
            "rtx-4090", "GeForce RTX 4090", "rtx", 89, 24, 1008,
            {"fp32": 82.6, "fp16": 165.2, "bf16": 165.2, "int8": 660.6, "fp8": 330.3}, 2.0,
            "NVIDIA Ada GPU architecture whitepaper, appendix A: FP16 and FP8 with FP32 accumulation",
            "memory, bandwidth and all rates with a third party's table (waredb.com)",
        ),
        Board(
            "rtx-5090", "GeForce RTX 5090", "rtx", 120, 32, 1792,
            {"fp32": 104.8, "fp16": 209.5, "bf16": 209.5, "int8": 838, "fp8": 419, "nvfp4": 1676}, 2.0,
            "NVIDIA RTX Blackwell GPU architecture whitepaper, appendix A: FP16 and FP8 with FP32 accumulation",
            "memory, bandwidth, fp32, fp16, nvfp4 with third parties' tables; bf16, fp8 and int8 unverified",
        ),
    )
}  # fmt: skip


def target_named(name: str) -> Target:
    """Return a TensorRT target; raises `QuantVLAError` for an unknown name."""
    if name not in TARGETS:
        raise explain(f"target {name!r}", "no TensorRT target", remedy=nearest(name, TARGETS))
    return TARGETS[name]


def target_serving(compute_capability: int) -> Target | None:
    """Return the target whose TensorRT builds for a GPU, None if there is none."""
    able = (t for t in TARGETS.values() if compute_capability in t.compute_capabilities)
    return next(able, None)


def board_named(name: str) -> Board:
    """Return a board; raises `QuantVLAError` for an unknown name."""
    if name not in BOARDS:
        raise explain(f"board {name!r}", "unknown", remedy=nearest(name, BOARDS))
    return BOARDS[name]


def boards_of(target: str) -> tuple[Board, ...]:
    """Return the boards of a target, the one that is planned for by default first."""
    defaults = {"rtx": "rtx-4090"}
    boards = [board for board in BOARDS.values() if board.target == target]
    return tuple(sorted(boards, key=lambda board: board.name != defaults.get(target)))


def formats_of(compute_capability: int) -> tuple[str, ...]:
    """Return the formats a GPU runs; raises `QuantVLAError` for a compute capability TensorRT has no entry for."""
    if compute_capability not in FORMATS:
        raise explain(
            f"SM{compute_capability}",
            "not a GPU these targets know",
            remedy=f"known: {', '.join(f'SM{known}' for known in FORMATS)}",
        )
    return FORMATS[compute_capability]
