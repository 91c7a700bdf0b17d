"""What reaches each linear in one run of its stage: how many tokens, and whether only the time decides them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from quantvla.families.base import LoadedPolicy, Stage
from quantvla.runtime.manifest import TensorSpec


def count_site_tokens(loaded: LoadedPolicy) -> Mapping[str, int]:
    """Return site -> tokens one run of its stage puts through it; runs every stage once, on ones."""
    tokens: dict[str, int] = {}

    def count(site: str, width: int) -> object:
        def add(_module: object, inputs: tuple[Tensor, ...]) -> None:
            tokens[site] = tokens.get(site, 0) + inputs[0].numel() // width

        return add

    hooks = {site.name: count(site.name, site.in_features) for site in loaded.used_sites}
    with _hooks(loaded, hooks), torch.inference_mode():
        for stage in loaded.stages:
            ones = (torch.ones(s.shape, dtype=getattr(torch, s.dtype)) for s in stage.inputs)
            stage.module(*ones)
    return tokens


def sites_of_time(loaded: LoadedPolicy) -> frozenset[str]:
    """Return the sites of the repeated stage whose input changes with the time and with nothing else.

    Runs that stage three times: twice at one time with everything else drawn anew, once at another time.
    """
    sampler = loaded.interface.sampler
    stage = loaded.stage(sampler.stage)
    first, other, later = (
        _inputs_seen(loaded, stage, sampler.time, time, seed)
        for time, seed in ((1.0, 0), (1.0, 1), (0.5, 1))
    )
    return frozenset(
        site
        for site, seen in first.items()
        if torch.equal(seen, other[site]) and not torch.equal(seen, later[site])
    )


def _inputs_seen(
    loaded: LoadedPolicy, stage: Stage, time_name: str, time: float, seed: int
) -> dict[str, Tensor]:
    """Return what reaches every linear of ``stage`` at ``time``, its other float inputs drawn with ``seed``."""
    seen: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)

    def keep(site: str) -> object:
        def add(_module: object, inputs: tuple[Tensor, ...]) -> None:
            seen[site] = inputs[0].clone()

        return add

    def example(spec: TensorSpec) -> Tensor:
        if spec.name == time_name:
            return torch.full(spec.shape, time)
        if spec.dtype == "float32":
            return torch.randn(spec.shape, generator=generator)
        return torch.ones(spec.shape, dtype=getattr(torch, spec.dtype))

    sites = [site.name for site in loaded.used_sites if site.stage == stage.name]
    with _hooks(loaded, {site: keep(site) for site in sites}), torch.inference_mode():
        stage.module(*map(example, stage.inputs))
    return seen


@contextmanager
def _hooks(loaded: LoadedPolicy, hooks: Mapping[str, object]) -> Iterator[None]:
    """Call ``hooks`` (by site) before their sites while the block runs."""
    handles = [
        loaded.policy.get_submodule(site).register_forward_pre_hook(hook)  # type: ignore[arg-type]
        for site, hook in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
