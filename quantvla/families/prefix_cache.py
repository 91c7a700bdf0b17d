"""Policies whose action head attends to the keys and values of a language model: their stages, attentions and unused linears.

lerobot writes these policies alike: ``model.embed_prefix``, one forward pass of both towers that fills a cache, and
``model.denoise_step`` on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from quantvla.families.base import Site, Stage, tensor_spec
from quantvla.runtime.manifest import EulerSampler, TensorSpec
from quantvla.structure import Attention, ValueHeads, ValueReader

MaskOf = Callable[[Tensor, Tensor], Tensor]
"""(padding (1, prefix), where attention blocks begin (1, prefix)) -> the mask that the towers take."""


@dataclass(frozen=True)
class Shapes:
    """Sizes of the tensors between stages. ``prefix``: positions of images, text and whatever else the prefix has."""

    cameras: int
    empty_cameras: int
    image: tuple[int, int]
    image_tokens: int
    hidden: int
    text: int
    prefix: int
    layers: int
    key_value_heads: int
    head_dim: int


class _Vision(nn.Module):
    """images (cameras, 3, height, width) in [-1, 1] -> image_features (cameras, tokens, hidden)."""

    def __init__(self, policy: nn.Module, towers: str) -> None:
        super().__init__()
        self.policy, self.towers = policy, towers

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = getattr(self.policy.model, self.towers).embed_image(images)
        return features


class _Prefix(nn.Module):
    """Image features, tokens (1, length), perhaps a state (1, padded) -> keys, values (layers, 1, heads, prefix, head_dim), prefix_mask (1, prefix)."""

    def __init__(self, policy: nn.Module, towers: str, empty_cameras: int, mask_of: MaskOf) -> None:
        super().__init__()
        self.policy, self.towers = policy, towers
        self.empty_cameras, self.mask_of = empty_cameras, mask_of

    def forward(
        self,
        image_features: Tensor,
        tokens: Tensor,
        token_mask: Tensor,
        state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        model: Any = self.policy.model
        towers = getattr(model, self.towers)
        features = [image_features[i : i + 1] for i in range(image_features.shape[0])]
        masks = [torch.ones(1, dtype=torch.bool) for _ in features]
        for _ in range(self.empty_cameras):  # masked, so what stands there does not matter
            features.append(torch.zeros_like(features[0]))
            masks.append(torch.zeros(1, dtype=torch.bool))
        # lerobot lays out the prefix; the features are already there, so embedding one is the identity.
        with mock.patch.object(towers, "embed_image", lambda image: image):
            embeddings, pad, attention = model.embed_prefix(
                features, masks, tokens, token_mask, **_given(state)
            )
        _, cache = towers.forward(
            attention_mask=self.mask_of(pad, attention),
            position_ids=torch.cumsum(pad, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[embeddings, None],
            use_cache=True,
        )
        keys = torch.stack([layer.keys for layer in cache.layers])
        values = torch.stack([layer.values for layer in cache.layers])
        return keys, values, pad


class _Denoise(nn.Module):
    """One call of the velocity field: x (1, horizon, padded action), timestep (1,), perhaps a state -> velocity like x."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(
        self,
        keys: Tensor,
        values: Tensor,
        prefix_mask: Tensor,
        x: Tensor,
        timestep: Tensor,
        state: Tensor | None = None,
    ) -> Tensor:
        cache = DynamicCache()
        for layer in range(keys.shape[0]):
            cache.update(keys[layer], values[layer], layer)
        model: Any = self.policy.model
        velocity: Tensor = model.denoise_step(
            prefix_pad_masks=prefix_mask,
            past_key_values=cache,
            x_t=x,
            timestep=timestep,
            **_given(state),
        )
        return velocity


def _given(state: Tensor | None) -> dict[str, Tensor]:
    return {} if state is None else {"state": state}


def make_stages(
    policy: nn.Module,
    towers: str,
    mask_of: MaskOf,
    shapes: Shapes,
    sampler: EulerSampler,
    *,
    repeat: int,
    prefix_state: int | None = None,
    denoise_state: int | None = None,
) -> tuple[Stage, ...]:
    """Return the stages vision, prefix and denoise, which is called ``repeat`` times.

    ``towers``: attribute of ``policy.model`` with both towers; ``prefix_state``, ``denoise_state``: length of the
    padded state where the stage takes it.
    """
    height, width = shapes.image
    cache = (shapes.layers, 1, shapes.key_value_heads, shapes.prefix, shapes.head_dim)
    images = tensor_spec("images", shapes.cameras, 3, height, width)
    features = tensor_spec("image_features", shapes.cameras, shapes.image_tokens, shapes.hidden)
    tokens = tensor_spec("tokens", 1, shapes.text, dtype="int64")
    token_mask = tensor_spec("token_mask", 1, shapes.text, dtype="bool")
    context = (
        tensor_spec("keys", *cache),
        tensor_spec("values", *cache),
        tensor_spec("prefix_mask", 1, shapes.prefix, dtype="bool"),
    )
    noise, time = tensor_spec("x", *sampler.noise_shape), tensor_spec("timestep", 1)
    prefix = _Prefix(policy, towers, shapes.empty_cameras, mask_of)
    own = _state(denoise_state)
    return (
        Stage("vision", _Vision(policy, towers), (images,), (features,)),
        Stage("prefix", prefix, (features, tokens, token_mask, *_state(prefix_state)), context, attended=True),
        Stage(
            "denoise", _Denoise(policy), (*context, noise, time, *own),
            (tensor_spec("velocity", *sampler.noise_shape),), repeat=repeat, batch_axes=(1, 1, 0, 0, 0, *(0 for _ in own)),
        ),
    )  # fmt: skip


def _state(length: int | None) -> tuple[TensorSpec, ...]:
    return () if length is None else (tensor_spec("state", 1, length),)


def why_unused(site: Site, last_layer: int) -> str:
    """Return why a linear is never read where the action head takes keys and values only, "" if it is read."""
    if site.kind == "lm_head":
        return "token logits are never read: the expert takes keys and values"
    if site.part == "llm" and site.layer == last_layer and site.kind not in ("k_proj", "v_proj"):
        return "of the last layer the expert takes only keys and values"
    return ""


def find_attentions(sites: Iterable[Site], heads: int, vision_heads: int) -> Iterator[Attention]:
    """Yield the attentions whose output projection is among ``sites``; both towers have ``heads`` query heads."""
    for site in sites:
        if site.kind in ("o_proj", "out_proj"):
            assert site.layer is not None
            own = vision_heads if site.part == "vision" else heads
            yield Attention(
                q=site.name.removesuffix(site.kind) + "q_proj", o=site.name, part=site.part,
                layer=site.layer, heads=own, head_dim=site.in_features // own,
            )  # fmt: skip


def vision_values(sites: Iterable[Site], heads: int) -> Iterator[ValueHeads]:
    """Yield the value heads of the vision tower, each read by the output projection beside it."""
    for site in sites:
        if site.kind == "v_proj" and site.part == "vision":
            out = ValueReader(site.name.removesuffix("v_proj") + "out_proj", 1)
            yield ValueHeads(site.name, (site.name,), (out,), heads, site.out_features // heads)
