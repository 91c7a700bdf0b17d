"""Transformer blocks as most VLA policies have them: their linears, norms, MLPs and residual streams, found by name.

A block normalizes, attends and adds, then normalizes, runs an MLP and adds. What a family does
otherwise it says itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from quantvla.families.base import Site
from quantvla.runtime.errors import explain
from quantvla.structure import Mlp, Norm, Stream

ATTENTION = r"self_attn\.(?P<kind>q_proj|k_proj|v_proj|o_proj|out_proj)"
MLP = r"mlp\.(?P<kind>gate_proj|up_proj|down_proj|fc1|fc2)"
LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")
SIGLIP_NORMS = ("layer_norm1", "layer_norm2")
CENTRED = "its LayerNorms subtract the mean over channels, which no rotation leaves alone"
"""Why the stream of a SigLIP tower is not rotated."""

_PRODUCERS = {
    "q_proj": "{norm1}", "k_proj": "{norm1}", "v_proj": "{norm1}",
    "gate_proj": "{norm2}", "up_proj": "{norm2}", "fc1": "{norm2}",
    "o_proj": "{block}self_attn.v_proj", "out_proj": "{block}self_attn.v_proj",
    "down_proj": "{block}mlp.up_proj", "fc2": "{block}mlp.fc1",
    "qkv": "{norm1}", "linear_fc1": "{norm2}", "linear_fc2": "{block}mlp.linear_fc1",
    "to_q": "{norm1}", "to_k": "{norm1}", "to_v": "{norm1}", "to_out.0": "{block}attn1.to_v",
    "net.0.proj": "{norm2}", "net.2": "{block}ff.net.0.proj",
}  # fmt: skip
"""Below those of transformers in its usual form those of Qwen3-VL's vision tower, then those of diffusers."""

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("to_q", "to_k", "to_v"))
_UP = {"down_proj": "up_proj", "fc2": "fc1", "linear_fc2": "linear_fc1", "net.2": "net.0.proj"}
_LAST = ("o_proj", "out_proj", "proj", "to_out.0", *_UP)


@dataclass(frozen=True)
class SitePattern:
    """Linears whose path matches ``pattern`` in full, which names their ``kind`` and maybe ``layer``.

    ``norms``: names inside a block of the norms before attention and before the MLP.
    """

    pattern: str
    stage: str
    part: str
    role: str
    norms: tuple[str, str] = LLAMA_NORMS


def tower(root: str, stage: str, part: str, norms: tuple[str, str] = LLAMA_NORMS) -> Iterator[SitePattern]:  # fmt: skip
    """Yield the patterns of the attentions and MLPs below ``root``."""
    block = re.escape(root) + r"\.layers\.(?P<layer>\d+)\."
    yield SitePattern(block + ATTENTION, stage, part, "attention", norms)
    yield SitePattern(block + MLP, stage, part, "mlp", norms)


def find_sites(
    policy: nn.Module,
    patterns: Sequence[SitePattern],
    adjust: Callable[[Site], Site] = lambda site: site,
) -> tuple[Site, ...]:
    """Return every linear of ``policy``, described by the first pattern that fits and then by ``adjust``.

    Raises `QuantVLAError` for a linear that no pattern knows.
    """
    return tuple(
        adjust(_site(name, module, patterns))
        for name, module in policy.named_modules()
        if isinstance(module, nn.Linear)
    )


def _site(name: str, linear: nn.Linear, patterns: Sequence[SitePattern]) -> Site:
    for entry in patterns:
        if match := re.fullmatch(entry.pattern, name):
            break
    else:
        raise explain(
            name, "a linear this family does not know", remedy="add it to the family's patterns"
        )
    groups = match.groupdict()
    kind, layer = groups["kind"], int(groups["layer"]) if groups.get("layer") else None
    return Site(
        name=name, stage=entry.stage, part=entry.part, role=entry.role, kind=kind, layer=layer,
        out_features=linear.out_features, in_features=linear.in_features,
        bias=linear.bias is not None,
        producer=_producer(name, kind, layer, entry.norms), siblings=_siblings(name, kind, layer),
    )  # fmt: skip


def _producer(name: str, kind: str, layer: int | None, norms: tuple[str, str]) -> str | None:
    if layer is None or kind not in _PRODUCERS:
        return None
    block = name[: name.index(f".{layer}.") + len(f".{layer}.")]
    return _PRODUCERS[kind].format(norm1=block + norms[0], norm2=block + norms[1], block=block)


def _siblings(name: str, kind: str, layer: int | None) -> tuple[str, ...]:
    stem = name.removesuffix(kind)
    for group in _SIBLINGS:
        if kind in group and layer is not None:
            return tuple(stem + other for other in group if other != kind)
    return ()


def norm_readers(sites: Iterable[Site]) -> dict[str, tuple[str, ...]]:
    """Return the linears that read each norm, by the norm's path."""
    readers: dict[str, list[str]] = {}
    for site in sites:
        if site.producer is not None and "norm" in site.producer.rpartition(".")[2]:
            readers.setdefault(site.producer, []).append(site.name)
    return {name: tuple(names) for name, names in readers.items()}


def find_mlps(sites: Iterable[Site]) -> Iterator[Mlp]:
    """Yield the MLPs of blocks whose last linear is among ``sites``."""
    sites = list(sites)
    names = {site.name for site in sites}
    for site in sites:
        if site.kind in _UP and site.role == "mlp":
            stem = site.name.removesuffix(site.kind)
            gate = stem + "gate_proj"
            yield Mlp(stem + _UP[site.kind], site.name, gate if gate in names else None)


def residual_stream(
    name: str, embedders: tuple[str, ...], sites: Iterable[Site], part: str, root: str,
    norms: Sequence[Norm], policy: nn.Module, *, obstacle: str = "",
) -> Stream:  # fmt: skip
    """Return the stream of one tower: ``embedders``, every attention and MLP add to it, every norm below ``root`` reads it."""
    writers = [site.name for site in sites if site.part == part and site.kind in _LAST]
    own = [norm for norm in norms if norm.name.startswith(root)]
    reader: Any = policy.get_submodule(own[0].readers[0])
    return Stream(
        name, int(reader.in_features), (*embedders, *writers),
        tuple(norm.name for norm in own), obstacle,
    )  # fmt: skip
