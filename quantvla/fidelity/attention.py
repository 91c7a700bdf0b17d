"""The reference arithmetic of the project's own attentions (runtime/kernels): in float32 or with bfloat16 products."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quantvla.export.site_values import AttentionValues


def attention_difference(values: AttentionValues, *, bfloat16: bool) -> float:
    """Return how far an attention's output is from the reference's, over the largest magnitude of that."""
    expected = reference_attention(values, bfloat16=bfloat16)
    return float(np.abs(values.out - expected).max() / max(float(np.abs(expected).max()), 1e-12))


def reference_attention(
    values: AttentionValues, *, bfloat16: bool
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Return softmax(scale q k^T + bias) v: (batch, queries, heads * dim).

    ``bfloat16``: queries, keys, values and the exponentials, before they are divided by their sum, are rounded to
    bfloat16; products are exact, sums and exponentials float32. The sum is of the exponentials before rounding.
    """
    q, k, v = (_heads(part, values.heads, bfloat16) for part in (values.q, values.k, values.v))
    scores = (q @ k.transpose(-1, -2)) * values.scale
    if values.bias is not None:
        lowest = torch.finfo(torch.float32).min  # a row that is masked whole has equal shares
        scores = (scores + torch.from_numpy(values.bias)).clamp_min(lowest)
    shares = (scores - scores.amax(-1, keepdim=True)).exp()
    total = shares.sum(-1, keepdim=True)
    found = _rounded(shares, bfloat16) @ v / total
    return found.transpose(1, 2).reshape(values.q.shape).numpy()


def _heads(
    value: np.ndarray[tuple[int, ...], np.dtype[np.float32]], heads: int, bfloat16: bool
) -> Tensor:
    """Return (batch, n, heads * dim) as (batch, heads, n, dim)."""
    batch, count, width = value.shape
    split = torch.from_numpy(value).view(batch, count, heads, width // heads)
    return _rounded(split.transpose(1, 2), bfloat16)


def _rounded(value: Tensor, bfloat16: bool) -> Tensor:
    return value.bfloat16().float() if bfloat16 else value
