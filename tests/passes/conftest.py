"""The tiny policy under passes: norms with gains to fold, a pipeline with its work in a temporary directory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantvla.calib_sets import CalibrationSet, limit, open_set
from quantvla.families import load_policy
from quantvla.families.base import LoadedPolicy
from quantvla.layout import make_plan
from quantvla.pipeline import Pipeline
from quantvla.quantize import make_pipeline
from quantvla.recipe import Recipe, read_recipe
from quantvla.structure import Structure
from quantvla.weight_store import DirectoryStore


@pytest.fixture(scope="session")
def frames(tiny_set: Path) -> CalibrationSet:
    return limit(open_set(tiny_set), frames=6, seed=0).part("calibration")


@pytest.fixture
def loaded(tiny_checkpoint: Path) -> LoadedPolicy:
    """The tiny policy; its norms get gains, and where they have biases those too, so that folds have work."""
    policy = load_policy(tiny_checkpoint)
    generator = torch.Generator().manual_seed(0)
    for norm in policy.structure.norms:
        module: Any = policy.policy.get_submodule(norm.name)
        with torch.no_grad():
            module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
            if norm.kind == "layer":
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator) / 10)
    return policy


@pytest.fixture
def pipeline(
    loaded: LoadedPolicy, frames: CalibrationSet, tmp_path: Path
) -> Callable[..., Pipeline]:
    def make(recipe: Recipe | str = "rtn-w4a8", structure: Structure | None = None) -> Pipeline:
        chosen = read_recipe(recipe) if isinstance(recipe, str) else recipe
        policy = loaded if structure is None else replace(loaded, structure=structure)
        work = tmp_path / "work"
        return make_pipeline(
            policy, make_plan(policy.sites, chosen), frames, DirectoryStore(work),
            seed=0, work=work, progress=lambda _what, _done, _total: None,
        )  # fmt: skip

    return make
