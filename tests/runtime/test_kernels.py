"""The project's own kernels against the reference arithmetic, on every instruction set of this processor."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from quantvla.export.panels import from_panels, to_panels
from quantvla.export.site_values import AttentionValues
from quantvla.fidelity.attention import attention_difference
from quantvla.quantizer import integer_linear, pack_codes, quantize_weight, unpack_codes
from quantvla.runtime import kernels
from quantvla.runtime.kernels.build import SOURCES, BuildError, build, is_current
from quantvla.verify_report import DEFAULT_THRESHOLDS

SETS = ("portable", "avx2", "avx512-vnni", "neon-dot", "neon-i8mm")
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if not is_current(kernels.LIBRARY):
        return ctypes.CDLL(str(build(tmp_path_factory.mktemp("kernels") / "kernels.so")))
    return ctypes.CDLL(str(kernels.LIBRARY))


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pointer(array: NDArray[Any] | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data if array is not None else None)


def run_linear(
    library: ctypes.CDLL, name: str, x: torch.Tensor, weight: Any, bias: torch.Tensor | None,
    other: torch.Tensor | None = None, activation: int = 0, combine: int = 0,
) -> NDArray[np.float32] | None:  # fmt: skip
    """Return the output of the kernels called ``name``, None where this processor lacks them."""
    rows, columns = weight.codes.shape
    codes = to_panels(pack_codes(weight.codes, weight.bits).numpy())
    scales = np.ascontiguousarray(
        weight.scales.numpy().reshape(rows // 16, 16, -1).transpose(0, 2, 1)
    )
    arrays = [t.contiguous().numpy() if t is not None else None for t in (x, bias, other)]
    y = np.full((x.shape[0], rows), np.nan, np.float32)
    status = library.quantvla_linear(
        name.encode(), pointer(arrays[0]), x.shape[0], pointer(codes), pointer(scales), weight.bits,
        columns, rows, weight.block, pointer(arrays[1]), pointer(arrays[2]), activation, combine, pointer(y),
    )  # fmt: skip
    return y if status == 0 else None


@needs_compiler
@pytest.mark.parametrize("seed", range(24))
def test_every_instruction_set_computes_the_reference(library: ctypes.CDLL, seed: int) -> None:
    generator = np.random.default_rng(seed)
    bits, block = int(generator.choice([4, 8])), int(generator.choice([8, 16, 32, 64, 128, 240]))
    blocks, rows = int(generator.integers(1, 5)), int(generator.choice([1, 2, 12, 13, 14, 50, 131]))
    out, activation = 16 * int(generator.integers(1, 9)), int(generator.integers(3))
    combine, with_bias = int(generator.integers(3)), bool(generator.integers(2))
    weight = quantize_weight(random(out, blocks * block, seed=seed), bits, block)
    x, other = random(rows, blocks * block, seed=seed + 1), random(rows, out, seed=seed + 2)
    x[0, :block] = 0  # a block of zeros has no scale
    x[-1] *= 1e4
    bias = random(out, seed=seed + 3) if with_bias else None
    expected = integer_linear(x, weight, bias)
    expected = (
        expected, functional.gelu(expected, approximate="tanh"), functional.silu(expected)
    )[activation]  # fmt: skip
    expected = (expected, expected + other, expected * other)[combine]
    found = {
        name: run_linear(
            library, name, x, weight, bias, other if combine else None, activation, combine
        )
        for name in SETS
    }
    present = {name: y for name, y in found.items() if y is not None}
    assert "portable" in present
    size = expected.abs().amax(1, keepdim=True).clamp_min(1e-6).numpy()
    for name, y in present.items():
        assert np.abs((y - expected.numpy()) / size).max() < 1e-5, name
        assert np.array_equal(y, present["portable"]), f"{name}: other bits than portable"


@needs_compiler
def test_activations_near_a_rounding_boundary_get_the_codes_of_the_reference(
    library: ctypes.CDLL,
) -> None:
    rng = np.random.default_rng(0)
    largest = rng.uniform(0.1, 20, (200, 1)).astype(np.float32)
    x = (rng.integers(-127, 127, (200, 63)) + 0.5) * (largest / np.float32(127))
    inputs = torch.from_numpy(np.concatenate([x.astype(np.float32), largest], axis=1))
    weight = quantize_weight(random(16, 64, seed=0), 8, 64)
    expected = integer_linear(inputs, weight).numpy()
    for name in SETS:
        y = run_linear(library, name, inputs, weight, None)
        assert y is None or np.abs(y - expected).max() < 1e-5 * np.abs(expected).max(), name


@needs_compiler
def test_extreme_codes_do_not_saturate(library: ctypes.CDLL) -> None:
    """All products at their largest: where byte products are added in 16 bits, the sum would not fit."""
    for bits in (4, 8):
        low = -(2 ** (bits - 1))
        weight = quantize_weight(torch.ones(16, 64), bits, 64, search=False)
        weight.codes.copy_(
            torch.tensor([low, -low - 1]).repeat_interleave(8)[:, None].expand(16, 64)
        )
        for sign in (1.0, -1.0):
            x = torch.full((3, 64), sign)
            expected = integer_linear(x, weight).numpy()
            for name in SETS:
                y = run_linear(library, name, x, weight, None)
                assert y is None or np.allclose(y, expected, rtol=1e-6), name


@needs_compiler
def test_an_input_that_is_not_a_number_stays_visible(library: ctypes.CDLL) -> None:
    weight = quantize_weight(random(16, 64, seed=0), 8, 32)
    x = random(3, 64, seed=1)
    x[1, 40] = torch.nan
    for name in SETS:
        y = run_linear(library, name, x, weight, None)
        assert y is None or (np.isnan(y[1]).all() and np.isfinite(y[[0, 2]]).all()), name


@pytest.mark.parametrize("bits", [4, 8])
def test_panels_hold_the_weight(bits: int) -> None:
    high = 2 ** (bits - 1)
    codes = torch.randint(
        -high, high, (48, 96), dtype=torch.int8, generator=torch.Generator().manual_seed(0)
    )
    rows = pack_codes(codes, bits).numpy()
    panels = to_panels(rows)
    assert panels.shape == (3, 96 * bits // 8 * 16)
    assert np.array_equal(from_panels(panels), rows)
    assert torch.equal(unpack_codes(torch.from_numpy(from_panels(panels)), bits), codes)


@needs_compiler
@pytest.mark.parametrize(
    ("name", "rms"), [("portable", 1e-6), ("avx2", 1e-6), ("avx512-bf16", 4e-3)]
)
@pytest.mark.parametrize(
    ("queries", "keys", "dim"), [(1, 1, 32), (50, 33, 64), (61, 177, 64), (7, 300, 96)]
)
def test_attention_is_that_of_torch(
    library: ctypes.CDLL, queries: int, keys: int, dim: int, name: str, rms: float
) -> None:
    heads, scale = 3, dim**-0.5
    q, k, v = (random(n, heads * dim, seed=i) for i, n in enumerate((queries, keys, keys)))
    mask = torch.where(random(queries, keys, seed=3) > 1, torch.finfo(torch.float32).min, 0.0)
    mask[0] = torch.finfo(torch.float32).min  # a row that is masked whole has equal shares
    out = np.full((queries, heads * dim), np.nan, np.float32)
    status = library.quantvla_attend(
        name.encode(), *(pointer(t.numpy()) for t in (q, k, v, mask)), 1, heads, queries, keys, dim,
        ctypes.c_float(scale), pointer(out),
    )  # fmt: skip
    if status != 0:
        pytest.skip("not on this processor")
    split = [t.view(1, -1, heads, dim).transpose(1, 2) for t in (q, k, v)]
    expected = functional.scaled_dot_product_attention(*split, attn_mask=mask[None, None])
    expected = expected.transpose(1, 2).reshape(queries, -1)
    assert np.sqrt(np.mean((out - expected.numpy()) ** 2)) < rms
    arrays = (t.numpy()[None] for t in (q, k, v, mask[None], torch.from_numpy(out)))
    values = AttentionValues(*arrays, heads, scale)
    bfloat16 = kernels.BFLOAT16 in name
    limit = DEFAULT_THRESHOLDS.attention if bfloat16 else 1e-5
    assert attention_difference(values, bfloat16=bfloat16) < limit


@needs_compiler
@pytest.mark.slow
def test_kernels_under_sanitizers(tmp_path: Path, library: ctypes.CDLL) -> None:
    library.quantvla_kernels.restype = ctypes.c_char_p
    driver = Path(__file__).with_name("kernels_driver.cpp")
    program = tmp_path / "driver"
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    build(program, extra=flags, link=(), sources=[driver])
    weight = quantize_weight(random(16, 8, seed=0), 8, 8)
    names = [
        n for n in SETS if run_linear(library, n, random(1, 8, seed=0), weight, None) is not None
    ]
    done = subprocess.run([program, *names], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stdout + done.stderr


@needs_compiler
@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-g++"), reason="no cross compiler")
def test_the_arm_kernels_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "aarch64-linux-gnu-g++")
    driver = Path(__file__).with_name("kernels_driver.cpp")
    program = build(tmp_path / "driver", machine="aarch64", link=("-static",), sources=[driver])
    if shutil.which("qemu-aarch64"):
        command = ["qemu-aarch64", "-cpu", "max", program, "neon-dot", "neon-i8mm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "ok\n"), done.stdout + done.stderr


def test_without_a_compiler_the_build_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        BuildError, match=r"no C\+\+ compiler found \(no-such-compiler\); install one"
    ):
        build(tmp_path / "kernels.so")
    done = subprocess.run(
        [sys.executable, SOURCES / "build.py"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "kernels not built: no C++ compiler" in done.stderr


def test_a_missing_a_broken_and_a_switched_off_library_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "LIBRARY", tmp_path / "missing.so")
    assert "own kernels are not built" in kernels.available().describe()
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(kernels, "LIBRARY", broken)
    assert "own kernels do not load: " in kernels.available().describe()
    monkeypatch.setenv(kernels.SWITCH, "off")
    assert (
        kernels.available().describe()
        == "ONNX Runtime's (own kernels switched off by QUANTVLA_KERNELS)"
    )
