"""Shapes of published VLA policies, as data: what to estimate before there is a graph.

Dimensions are those of the lerobot 0.6.1 and Isaac-GR00T model definitions; camera, text and chunk sizes
are those of the published measurements as far as they state them (two cameras, batch 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantvla.roofline import Product, StageWork

_KERNELS_PER_LAYER = (
    9  # after fusion: norms, products (q, k, v in one), attention, activation, residuals
)


@dataclass(frozen=True)
class Tower:
    """A stack of transformer layers. ``tokens``: in a sequence, ``keys``: attended to, ``batch``: sequences.

    ``gated``: three MLP weights instead of two. ``own_keys`` False: keys and values are constant over
    the runs and not computed here.
    """

    stage: str
    layers: int
    hidden: int
    heads: int
    key_heads: int
    head_dim: int
    mlp: int
    gated: bool
    tokens: int
    keys: int
    batch: int = 1
    repeat: int = 1
    own_keys: bool = True

    def work(self) -> StageWork:
        """Return what one run does."""
        rows, wide = self.tokens * self.batch, self.heads * self.head_dim
        products = [
            Product("q", rows, self.hidden, wide, self.layers),
            Product("o", rows, wide, self.hidden, self.layers),
            Product("mlp_in", rows, self.hidden, self.mlp * (2 if self.gated else 1), self.layers),
            Product("mlp_out", rows, self.mlp, self.hidden, self.layers),
        ]
        if self.own_keys:
            narrow = 2 * self.key_heads * self.head_dim
            products.append(Product("k,v", rows, self.hidden, narrow, self.layers))
        many = self.layers * self.heads * self.batch
        products += [
            Product("logits", self.tokens, self.head_dim, self.keys, many, stored=False),
            Product("attended", self.tokens, self.keys, self.head_dim, many, stored=False),
        ]
        return StageWork(self.stage, self.repeat, tuple(products), self.layers * _KERNELS_PER_LAYER)


@dataclass(frozen=True)
class KnownModel:
    """A published policy: its towers in order of execution, and the inputs they assume."""

    title: str
    inputs: str
    towers: tuple[Tower, ...]

    def works(self) -> tuple[StageWork, ...]:
        """Return the work of every tower."""
        return tuple(tower.work() for tower in self.towers)


MODELS: Mapping[str, KnownModel] = {
    "smolvla": KnownModel(
        "SmolVLA 450M", "2 cameras 512x512, 48 text tokens, chunk 50, 10 steps",
        (
            Tower("vision", 12, 768, 12, 12, 64, 3072, False, 1024, 1024, batch=2),
            Tower("prefix", 16, 960, 15, 5, 64, 2560, True, 177, 177),
            Tower("denoise", 16, 720, 15, 5, 64, 2048, True, 50, 227, repeat=10),
        ),
    ),
    "pi05": KnownModel(
        "pi0.5", "2 cameras 224x224, 200 text tokens, chunk 50, 10 steps",
        (
            Tower("vision", 27, 1152, 16, 16, 72, 4304, False, 256, 256, batch=2),
            Tower("prefix", 18, 2048, 8, 1, 256, 16384, True, 712, 712),
            Tower("denoise", 18, 1024, 8, 1, 256, 4096, True, 50, 762, repeat=10),
        ),
    ),
    "groot-n1.7": KnownModel(
        "GR00T N1.7", "2 views 256x256, 168 tokens, chunk 40, 4 steps, modulation as tables",
        (
            Tower("vision", 24, 1024, 16, 16, 64, 4096, False, 256, 256, batch=2),
            Tower("prefix", 16, 2048, 16, 8, 128, 6144, True, 168, 168),
            Tower("features", 4, 2048, 32, 32, 64, 8192, False, 168, 168),
            Tower("denoise: cross", 16, 1536, 32, 32, 48, 6144, False, 41, 168, repeat=4, own_keys=False),
            Tower("denoise: self", 16, 1536, 32, 32, 48, 6144, False, 41, 41, repeat=4),
        ),
    ),
    "groot-n1.5": KnownModel(
        "GR00T N1.5", "2 views 224x224, 560 tokens, chunk 16, 4 steps, modulation as tables",
        (
            Tower("vision", 27, 1152, 16, 16, 72, 4304, False, 256, 256, batch=2),
            Tower("prefix", 12, 2048, 16, 8, 128, 6144, True, 560, 560),
            Tower("features", 4, 2048, 32, 32, 64, 8192, False, 560, 560),
            Tower("denoise: cross", 8, 1536, 32, 32, 48, 6144, False, 49, 560, repeat=4, own_keys=False),
            Tower("denoise: self", 8, 1536, 32, 32, 48, 6144, False, 49, 49, repeat=4),
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A vendor's figure: milliseconds a chunk at batch 1, and what of the row is an assumption here."""

    model: str
    board: str
    format: str
    latency_ms: float
    source: str


PUBLISHED = (
    Published("smolvla", "agx-orin-64", "bf16", 67, "ApxInf, BF16"),
    Published("pi05", "agx-orin-64", "bf16", 229, "TensorRT, BF16 (in FoldQuantVLA's comparison)"),
    Published("pi05", "agx-orin-64", "int8", 124, "FlashRT, INT8"),
    Published("groot-n1.7", "agx-orin-64", "int8", 57, "ApxInf, W8A8"),
    Published("groot-n1.5", "agx-orin-64", "int8", 117, "FoldQuantVLA, 111 to 123; format assumed"),
    Published("pi05", "agx-thor", "nvfp4", 27, "FlashRT, NVFP4"),
    Published("groot-n1.7", "agx-thor", "fp8", 24, "format assumed"),
    Published("smolvla", "rtx-4090", "bf16", 13.5, "format assumed"),
)
