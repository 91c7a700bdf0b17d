"""What is connected to what in a SmolVLA: norms, attentions, shared values, MLPs, residual streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor

from quantvla.families.base import Site
from quantvla.families.blocks import find_mlps, norm_readers, residual_stream
from quantvla.structure import (
    Attention,
    AttentionCallback,
    Norm,
    Structure,
    ValueHeads,
    ValueReader,
)

_LLM = "model.vlm_with_expert.vlm.model.text_model"
_EXPERT = "model.vlm_with_expert.lm_expert"
_VISION = "model.vlm_with_expert.vlm.model.vision_model"
_EMBEDDERS = (
    _LLM + ".embed_tokens",
    "model.vlm_with_expert.vlm.model.connector.modality_projection.proj",
    "model.state_proj",
)
_CENTRED = "its LayerNorms subtract the mean over channels, which no rotation leaves alone"


def make_structure(policy: SmolVLAPolicy, sites: Sequence[Site]) -> Structure:
    """Return the structure of a policy with these linears; what inference never reads is left out."""
    used = [site for site in sites if not site.unused]
    blocks = _Blocks({site.name: site for site in used}, policy.model.vlm_with_expert)
    norms = tuple(
        Norm(name, "layer" if name.startswith(_VISION) else "rms", readers)
        for name, readers in norm_readers(used).items()
    )
    stream = partial(residual_stream, sites=used, norms=norms, policy=policy)
    return Structure(
        norms=norms,
        attentions=tuple(blocks.attentions()),
        values=tuple(blocks.values()),
        mlps=tuple(find_mlps(used)),
        streams=(
            stream("language model", _EMBEDDERS, part="llm", root=_LLM),
            stream("action head", ("model.action_time_mlp_out",), part="expert", root=_EXPERT),
            stream("vision tower", (), part="vision", root=_VISION, obstacle=_CENTRED),
        ),
    )


class _Blocks:
    """Attentions layer by layer; the action head reads the language model's values of the same layer."""

    def __init__(self, sites: dict[str, Site], model: Any) -> None:
        self._sites, self._model = sites, model
        text, vision = model.config.text_config, model.config.vision_config
        self._heads, self._value_heads = text.num_attention_heads, text.num_key_value_heads
        self._head_dim = text.head_dim
        self._vision_heads = vision.num_attention_heads
        self._vision_dim = vision.hidden_size // vision.num_attention_heads

    def attentions(self) -> Iterator[Attention]:
        for site in self._sites.values():
            if site.kind in ("o_proj", "out_proj"):
                assert site.layer is not None
                tower = site.part == "vision"
                yield Attention(
                    q=site.name.removesuffix(site.kind) + "q_proj", o=site.name, part=site.part,
                    layer=site.layer, heads=self._vision_heads if tower else self._heads,
                    head_dim=self._vision_dim if tower else self._head_dim,
                )  # fmt: skip

    def values(self) -> Iterator[ValueHeads]:
        for site in list(self._sites.values()):
            if site.kind == "v_proj" and site.part == "vision":
                out = ValueReader(site.name.replace("v_proj", "out_proj"), 1)
                yield ValueHeads(
                    site.name, (site.name,), (out,), self._vision_heads, self._vision_dim
                )
        if self._model.num_expert_layers == self._model.num_vlm_layers:
            for layer in range(self._model.num_vlm_layers):
                yield from self._values_of(layer)

    def _values_of(self, layer: int) -> Iterator[ValueHeads]:
        value, out, own, own_out = (
            f"{root}.layers.{layer}.self_attn.{kind}"
            for root in (_LLM, _EXPERT)
            for kind in ("v_proj", "o_proj")
        )
        crossed = (
            self._sites[own].producer == value
        )  # reads the language model's values as its input
        readers = [name for name in (out, *(() if crossed else (own_out,))) if name in self._sites]
        yield self._heads_of(
            value,
            (value,) if crossed else (value, own),
            [self._averaged(name) for name in readers] + [ValueReader(own, 1)] * crossed,
        )
        if crossed:
            yield self._heads_of(own, (own,), [self._averaged(own_out)])

    def _averaged(self, site: str) -> ValueReader:
        return ValueReader(site, self._heads // self._value_heads)

    def _heads_of(
        self, name: str, writers: tuple[str, ...], readers: Sequence[ValueReader]
    ) -> ValueHeads:
        return ValueHeads(name, writers, tuple(readers), self._value_heads, self._head_dim)


@contextmanager
def tap_attention(policy: SmolVLAPolicy, callback: AttentionCallback) -> Iterator[None]:
    """Show ``callback`` the queries, keys and mask of every attention outside the vision tower while the block runs."""
    model = policy.model.vlm_with_expert
    original = model.eager_attention_forward
    asked: list[str] = []

    def attend(
        mask: Tensor, batch: int, head_dim: int, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        heads = query.shape[2] // key.shape[2]
        keys = key.repeat_interleave(heads, dim=2).transpose(1, 2)
        callback(asked[-1], query.transpose(1, 2), keys, mask)
        result: Tensor = original(mask, batch, head_dim, query, key, value)
        return result

    def remember(name: str, *_: object) -> None:
        asked[:] = [name]

    handles = [
        module.register_forward_pre_hook(partial(remember, name))
        for name, module in policy.named_modules()
        if name.endswith(".q_proj") and not name.startswith(_VISION)
    ]
    try:
        with mock.patch.object(model, "eager_attention_forward", attend):
            yield
    finally:
        for handle in handles:
            handle.remove()
