"""Resizing equals lerobot's resize_with_pad, which is torch's interpolate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lerobot.policies.common.vla_utils import resize_with_pad as lerobot_resize

from quantvla.runtime.resize import fitted_size, resize_with_pad

SIZES = [(480, 640), (128, 128), (720, 1280), (1080, 1920), (512, 512), (512, 300), (7, 1000)]


def _assert_equal(height: int, width: int, target: tuple[int, int], pad_value: float) -> None:
    rng = np.random.default_rng(height * 10_000 + width)
    image = (rng.integers(0, 256, (3, height, width)) / 255).astype(np.float32)
    expected = lerobot_resize(torch.from_numpy(image)[None], *target, pad_value=pad_value)[0]
    found = resize_with_pad(image, target, pad_value)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", [(512, 512), (224, 224), (384, 512)])
def test_common_sizes(size: tuple[int, int], target: tuple[int, int]) -> None:
    _assert_equal(*size, target, pad_value=0.0)


def test_random_sizes() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        height, width, *target = (int(n) for n in rng.integers(40, 700, 4))
        _assert_equal(height, width, (target[0], target[1]), pad_value=-1.0)


def test_input_is_left_alone() -> None:
    image = np.random.default_rng(0).random((3, 20, 30), dtype=np.float32)
    before = image.copy()
    resize_with_pad(image, (40, 40), 0.0)
    np.testing.assert_array_equal(image, before)


def test_padding_is_left_and_top() -> None:
    wide = resize_with_pad(np.ones((3, 10, 20), np.float32), (20, 20), 0.25)
    assert (wide[:, :10] == 0.25).all() and (wide[:, 10:] == 1).all()
    tall = resize_with_pad(np.ones((3, 20, 10), np.float32), (20, 20), 0.25)
    assert (tall[:, :, :10] == 0.25).all() and (tall[:, :, 10:] == 1).all()


def test_fitted_size_rounds_down() -> None:
    assert fitted_size((481, 640), (512, 512)) == (384, 512)
    assert fitted_size((1, 2000), (512, 512)) == (0, 512)
