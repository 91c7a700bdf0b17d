from __future__ import annotations

import numpy as np
import pytest
import torch

from quantvla import quantizer
from quantvla.quantizer import (
    integer_linear,
    pack_codes,
    pack_int4,
    quantize_activation,
    quantize_tensor,
    quantize_weight,
    represented_input,
    unpack_codes,
    unpack_int4,
)
from quantvla.schemes import INTEGER_SCHEMES, resolve_scheme


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weighted_error(weight: torch.Tensor, found: torch.Tensor, importance: torch.Tensor) -> float:
    return float(((weight - found).square() * importance).sum())


@pytest.mark.parametrize("block", [16, 32, 64])
def test_codes_stay_in_range_and_scales_are_half_precision(block: int) -> None:
    found = quantize_weight(random(24, 128), 4, block)
    assert found.codes.min() >= -8 and found.codes.max() <= 7
    assert found.scales.dtype == torch.float16 and found.scales.shape == (24, 128 // block)
    assert bool((found.scales > 0).all())


def test_a_representable_weight_is_kept_exactly() -> None:
    codes = torch.randint(-7, 8, (8, 64), generator=torch.Generator().manual_seed(1))
    codes[:, ::32] = 7  # every block reaches the largest code
    weight = codes.float() * 0.125
    assert torch.equal(quantize_weight(weight, 4, 32).dequantize(), weight)


def test_quantizing_what_is_already_quantized_changes_nothing() -> None:
    once = quantize_weight(random(16, 64), 4, 32).dequantize()
    twice = quantize_weight(once, 4, 32).dequantize()
    assert torch.allclose(once, twice, rtol=2e-3)


def test_smaller_blocks_do_not_increase_the_error() -> None:
    weight = random(32, 256)
    errors = [
        float((weight - quantize_weight(weight, 4, b).dequantize()).norm())
        for b in (16, 32, 64, 128)
    ]
    assert errors == sorted(errors)


def test_the_scale_search_beats_covering_the_largest_weight() -> None:
    weight, importance = random(32, 128), random(128, seed=3).square()
    found = quantize_weight(weight, 4, 32, importance).dequantize()
    blocks = weight.view(32, 4, 32)
    scale = (blocks.abs().amax(-1, keepdim=True) / 7).half().float()
    covering = ((blocks / scale).round().clamp(-8, 7) * scale).view_as(weight)
    assert weighted_error(weight, found, importance) < weighted_error(weight, covering, importance)


def test_importance_moves_error_to_channels_that_do_not_matter() -> None:
    weight = random(32, 64)
    importance = torch.full((64,), 1e-3)
    importance[::8] = 10.0
    plain = quantize_weight(weight, 4, 32).dequantize()
    weighted = quantize_weight(weight, 4, 32, importance).dequantize()
    assert weighted_error(weight, weighted, importance) < weighted_error(weight, plain, importance)


def test_zero_weights_stay_zero() -> None:
    found = quantize_weight(torch.zeros(4, 32), 4, 32)
    assert torch.equal(found.dequantize(), torch.zeros(4, 32))


def test_packing_is_a_round_trip_with_the_even_channel_in_the_low_nibble() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(2, 4)
    packed = pack_int4(codes)
    assert packed.shape == (2, 32)
    assert int(packed[0, 0]) == (-8 + 8) | ((-7 + 8) << 4)
    assert torch.equal(unpack_int4(packed), codes)


def test_activation_error_is_at_most_half_a_step() -> None:
    x = random(5, 64)
    codes, scale = quantize_activation(x, 32)
    restored = codes * scale[..., None]
    assert bool(((restored - x.view(5, 2, 32)).abs() <= scale[..., None] / 2 + 1e-6).all())
    assert codes.abs().max() <= 127


def test_activations_near_a_rounding_boundary_get_the_codes_of_one_division() -> None:
    """Kernels compute ``x * (127 / largest)`` in float32; an inverse that is off in its last bit gives other codes."""
    rng = np.random.default_rng(0)
    largest = rng.uniform(0.1, 20, 500).astype(np.float32)
    inverse = np.float32(127) / largest
    x = ((rng.integers(-127, 127, (500, 31)) + 0.5) / inverse[:, None]).astype(np.float32)
    x = np.concatenate([x, largest[:, None]], axis=1)
    codes, scale = quantize_activation(torch.from_numpy(x), 32)
    expected = np.clip(np.rint(x * inverse[:, None]), -127, 127)
    assert np.array_equal(codes.numpy()[:, 0], expected)
    assert np.array_equal(scale.numpy()[:, 0], largest / np.float32(127))


def test_integer_linear_is_the_product_of_the_dequantized_factors() -> None:
    x, weight, bias = (
        random(3, 7, 96),
        quantize_weight(random(40, 96, seed=2), 4, 32),
        random(40, seed=5),
    )
    codes, scale = quantize_activation(x.reshape(-1, 96), 32)
    x_hat = (codes * scale[..., None]).view(21, 96).double()
    expected = (x_hat @ weight.dequantize().double().t() + bias).view(3, 7, 40)
    assert torch.allclose(integer_linear(x, weight, bias).double(), expected, atol=1e-5)


def test_a_zero_token_gives_the_bias() -> None:
    weight = quantize_weight(random(8, 32), 4, 32)
    bias = random(8, seed=1)
    assert torch.equal(integer_linear(torch.zeros(1, 32), weight, bias)[0], bias)


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_keeps_every_code_of_its_width(bits: int) -> None:
    half = 2 ** (bits - 1)
    codes = torch.arange(-half, half, dtype=torch.int16).to(torch.int8).repeat(3, 1)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 2 * half * bits // 8)
    assert torch.equal(unpack_codes(packed, bits), codes)


@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0])
def test_per_tensor_codes_span_the_range_with_zero_in_it(shift: float) -> None:
    x = random(5, 64) + shift
    codes, scale = quantize_tensor(x)
    assert codes.max() - codes.min() <= 255 and bool((codes == codes.round()).all())
    assert float((codes * scale - x).abs().max()) <= float(scale) * (1 + 1e-5)
    assert torch.equal(quantize_tensor(torch.zeros(2, 3))[0], torch.zeros(2, 3))


@pytest.mark.parametrize("name", INTEGER_SCHEMES)
def test_every_scheme_multiplies_what_its_weight_and_its_input_stand_for(name: str) -> None:
    scheme = resolve_scheme(name, (32,), site="site", in_features=96)
    weight = quantize_weight(
        random(40, 96, seed=2), scheme.weight_bits, scheme.block, inputs=scheme.inputs
    )
    x, bias = random(3, 7, 96), random(40, seed=5)
    x_hat = represented_input(x.view(21, 96), scheme.block, scheme.inputs).double()
    expected = (x_hat @ weight.dequantize().double().t() + bias).view(3, 7, 40)
    assert torch.allclose(integer_linear(x, weight, bias).double(), expected, atol=1e-5)


def test_eight_bit_weights_are_at_least_ten_times_nearer_than_four_bit_ones() -> None:
    weight = random(24, 128)
    four, eight = (
        float((weight - quantize_weight(weight, b, 32).dequantize()).norm()) for b in (4, 8)
    )
    assert eight * 10 < four


def test_scales_do_not_depend_on_how_many_rows_are_searched_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, importance = random(37, 64), random(64, seed=1).abs()
    expected = quantize_weight(weight, 4, 16, importance)
    monkeypatch.setattr(quantizer, "_SEARCHED_AT_A_TIME", 5 * 64)
    found = quantize_weight(weight, 4, 16, importance)
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.scales, expected.scales)
