from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantvla.quantizer import StaticInput, quantize_weight
from quantvla.runtime.errors import QuantVLAError
from quantvla.weight_store import DirectoryStore


def test_the_newest_folder_counts_and_earlier_ones_stay_readable(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second = (quantize_weight(torch.randn(4, 32), 4, 16) for _ in range(2))
    store = DirectoryStore(tmp_path)
    store.open_folder(tmp_path / "pass-0")
    store.put("model.layers.0.q_proj", first)
    store.put("model.layers.0.k_proj", first)
    store.open_folder(tmp_path / "pass-1")
    store.put("model.layers.0.q_proj", second)
    again = DirectoryStore(tmp_path)
    assert "model.layers.0.q_proj" not in again
    for folder in ("pass-0", "pass-1"):
        again.open_folder(tmp_path / folder)
    for found in (store, again):
        assert torch.equal(found.get("model.layers.0.q_proj").codes, second.codes)
        assert torch.equal(found.get("model.layers.0.k_proj").scales, first.scales)
        assert "model.layers.1.q_proj" not in found


def test_static_inputs_survive_and_damage_is_named(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.open_folder(tmp_path / "weights")
    static = StaticInput(torch.randn(32, 32), torch.rand(32))
    plain = quantize_weight(torch.randn(4, 32), 4, 16, inputs="int8_static")
    store.put("site", replace(plain, static=static))
    found = store.get("site").static
    assert found is not None and torch.equal(found.transform, static.transform)
    (tmp_path / "weights" / "site.safetensors").write_bytes(b"damaged")
    with pytest.raises(QuantVLAError, match=r"site\.safetensors: intermediate result is damaged"):
        store.get("site")
