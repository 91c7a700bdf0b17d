"""How many tokens reach each linear in one run of its stage."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantvla.families.base import LoadedPolicy, Stage


def count_site_tokens(loaded: LoadedPolicy) -> Mapping[str, int]:
    """Return site -> tokens one run of its stage puts through it; runs every stage once, on ones."""
    tokens: dict[str, int] = {}

    def count(site: str, width: int) -> object:
        def add(_module: object, inputs: tuple[Tensor, ...]) -> None:
            tokens[site] = tokens.get(site, 0) + inputs[0].numel() // width

        return add

    handles = [
        loaded.policy.get_submodule(site.name).register_forward_pre_hook(
            count(site.name, site.in_features)  # type: ignore[arg-type]
        )
        for site in loaded.used_sites
    ]
    try:
        for stage in loaded.stages:
            _run(stage)
    finally:
        for handle in handles:
            handle.remove()
    return tokens


def _run(stage: Stage) -> None:
    with torch.inference_mode():
        stage.module(*(torch.ones(s.shape, dtype=getattr(torch, s.dtype)) for s in stage.inputs))
