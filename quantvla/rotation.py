"""Orthogonal matrices that spread outliers over channels, the same in every run."""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg import block_diag, hadamard, qr
from torch import Tensor


def random_hadamard(size: int, seed: int, block: int | None = None) -> Tensor:
    """Return an orthogonal matrix (size, size) float64: a Hadamard matrix after random signs.

    A size that is no power of two is the Kronecker product of a random orthogonal matrix and the
    largest Hadamard matrix that divides it (QuaRot, arXiv 2404.00456). With ``block`` it is block-diagonal
    with Hadamard matrices of the largest power of two up to ``block`` that divides ``size``.
    """
    generator = np.random.default_rng((seed, size))
    power = largest_power(size, size if block is None else block)
    small = hadamard(power, dtype=np.float64) / np.sqrt(power)
    rest = size // power
    if block is not None:
        spread = block_diag(*[small] * rest)
    else:
        spread = np.kron(_random_orthogonal(rest, generator), small)
    signs = generator.choice((-1.0, 1.0), size)
    return torch.from_numpy(signs[:, None] * spread)


def zigzag(sizes: Tensor, block: int) -> Tensor:
    """Return the order (channels,) that deals channels out to blocks by size, back and forth.

    Every block gets large and small channels alike (DuQuant, arXiv 2406.01721).
    """
    order = sizes.argsort(descending=True, stable=True)
    blocks = len(sizes) // block
    dealt = order.view(block, blocks)
    dealt[1::2] = dealt[1::2].flip(1)
    return dealt.t().reshape(-1)


def largest_power(size: int, limit: int) -> int:
    """Return the largest power of two that divides ``size`` and is at most ``limit``."""
    power = 1
    while size % (2 * power) == 0 and 2 * power <= limit:
        power *= 2
    return power


def _random_orthogonal(
    size: int, generator: np.random.Generator
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    if size == 1:
        return np.ones((1, 1))
    q, r = qr(generator.standard_normal((size, size)))
    return np.asarray(q * np.sign(np.diag(r)))
