from __future__ import annotations

import pytest
import torch

from quantvla.rotation import largest_power, random_hadamard, zigzag


@pytest.mark.parametrize(
    ("size", "block"), [(64, None), (960, None), (720, None), (48, 16), (45, None)]
)
def test_rotations_are_orthogonal_spread_and_reproducible(size: int, block: int | None) -> None:
    matrix = random_hadamard(size, 3, block)
    assert torch.allclose(matrix @ matrix.t(), torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.equal(matrix, random_hadamard(size, 3, block))
    assert not torch.equal(matrix, random_hadamard(size, 4, block))
    outlier = torch.zeros(size, dtype=torch.float64)
    outlier[7] = 1
    power = largest_power(size, block or size)
    # one channel ends up in at least as many as the Hadamard part has, none with more than its share there
    assert int((outlier @ matrix != 0).sum()) >= power
    assert block is None or int((outlier @ matrix != 0).sum()) == power


def test_zigzag_deals_every_block_the_same_lot() -> None:
    sizes = torch.arange(64.0).flip(0) ** 2
    order = zigzag(sizes, 16)
    assert sorted(order.tolist()) == list(range(64))
    ranks = (63 - sizes.sqrt())[order].view(4, 16)  # 0 is the largest channel
    assert (ranks.sum(1) == ranks.sum(1)[0]).all()
    plain = (63 - sizes.sqrt()).view(4, 16).sum(1)
    assert plain.max() > 2 * plain.min()


def test_largest_power_divides() -> None:
    assert [largest_power(n, 64) for n in (960, 720, 45, 64, 256)] == [64, 16, 1, 64, 64]
