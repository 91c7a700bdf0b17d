"""Qwen3-VL as a policy's front: vision tower and language model on one prompt layout.

lerobot and transformers take any number of images at any place in the prompt, and work out
positions, image indices and attention blocks in every call. On a robot the cameras and the prompt
around the sentence are fixed, so all of that is known when the policy is compiled; what is left are
tensors of fixed shape. Images of the cameras are a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.qwen3_vl import modeling_qwen3_vl

from quantvla.structure import AttentionCallback


@dataclass(frozen=True)
class Layout:
    """One prompt. ``tokens``: its length; ``images``: (first, last + 1) of each camera's image tokens, in order;
    ``grid``: patches of an image, (down, across)."""

    tokens: int
    images: tuple[tuple[int, int], ...]
    grid: tuple[int, int]

    @property
    def texts(self) -> tuple[tuple[int, int], ...]:
        """The stretches between images, and the one behind the last."""
        ends = [0, *(end for _, end in self.images)]
        starts = [*(start for start, _ in self.images), self.tokens]
        return tuple(zip(ends, starts, strict=True))


def find_images(tokens: Sequence[int], image_token: int) -> tuple[tuple[int, int], ...]:
    """Return the runs of ``image_token`` in a prompt."""
    runs: list[tuple[int, int]] = []
    for position, token in enumerate(tokens):
        if token == image_token:
            if runs and runs[-1][1] == position:
                runs[-1] = (runs[-1][0], position + 1)
            else:
                runs.append((position, position + 1))
    return tuple(runs)


class Vision(nn.Module):
    """images (cameras, 3, height, width) -> image_features (1 + levels, cameras, tokens, hidden).

    The first are what stands at the image tokens, the others are added there after the first
    layers of the language model (deepstack).
    """

    def __init__(self, policy: nn.Module, root: str, grid: tuple[int, int]) -> None:
        super().__init__()
        self.policy, self.root, self.grid = policy, root, grid
        with torch.no_grad():
            self.derive_()
            angles = self.visual.rot_pos_emb(torch.tensor([[1, *grid]]))
        self.cos, self.sin = (f(torch.cat((angles, angles), -1)) for f in (torch.cos, torch.sin))

    def derive_(self) -> None:
        """Interpolate the learned positions of patches again."""
        self.positions = self.visual.fast_pos_embed_interpolate(torch.tensor([[1, *self.grid]]))

    @property
    def visual(self) -> Any:
        """The tower, below ``policy``, where its linears have the names that sites have."""
        return self.policy.get_submodule(self.root)

    def forward(self, images: Tensor) -> Tensor:
        visual = self.visual
        hidden = self._patches(images) + self.positions
        levels = []
        for index, block in enumerate(visual.blocks):
            hidden = hidden + self._attend(block.attn, block.norm1(hidden))
            hidden = hidden + block.mlp(block.norm2(hidden))
            if index in visual.deepstack_visual_indexes:
                level = visual.deepstack_visual_indexes.index(index)
                levels.append(visual.deepstack_merger_list[level](hidden))
        merged = [visual.merger(hidden), *levels]
        return torch.stack([one.view(images.shape[0], -1, one.shape[-1]) for one in merged])

    def _patches(self, images: Tensor) -> Tensor:
        """Return embedded patches (cameras, patches, hidden), those that are merged side by side.

        A still image is the same frame twice, so the kernel's two frames are summed.
        """
        visual, (down, across) = self.visual, self.grid
        embed, merge = visual.patch_embed.proj, visual.spatial_merge_size
        found = functional.conv2d(images, embed.weight.sum(2), embed.bias, stride=visual.patch_size)
        blocks = found.view(found.shape[0], -1, down // merge, merge, across // merge, merge)
        return blocks.permute(0, 2, 4, 3, 5, 1).reshape(found.shape[0], down * across, -1)

    def _attend(self, attention: Any, hidden: Tensor) -> Tensor:
        cameras, tokens, width = hidden.shape
        parts = attention.qkv(hidden).view(cameras, tokens, 3, attention.num_heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        q, k = (x * self.cos + modeling_qwen3_vl.rotate_half(x) * self.sin for x in (q, k))
        weights = (q @ k.transpose(-1, -2) * attention.scaling).softmax(-1)
        found: Tensor = attention.proj(
            (weights @ v).transpose(1, 2).reshape(cameras, tokens, width)
        )
        return found


class Language(nn.Module):
    """The language model, read before its final norm; a family adds what its action head does with that.

    Inputs may be shorter than the layout: the sentence is at the end.
    """

    def __init__(self, policy: nn.Module, root: str, layout: Layout, prompt: Sequence[int]) -> None:
        super().__init__()
        self.policy, self.root, self.layout = policy, root, layout
        inner: Any = policy.get_submodule(root)
        ids = torch.tensor([[*prompt, *(0,) * (layout.tokens - len(prompt))]])
        kinds = torch.zeros_like(ids, dtype=torch.int32)
        for start, end in layout.images:
            kinds[:, start:end] = 1
        grids = torch.tensor([[1, *layout.grid]] * len(layout.images))
        positions, _ = inner.get_rope_index(ids, kinds, image_grid_thw=grids)
        with torch.no_grad():
            self.cos, self.sin = inner.language_model.rotary_emb(torch.zeros(1), positions)
        self.causal = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool).tril()

    def read(self, image_features: Tensor, tokens: Tensor, token_mask: Tensor) -> Tensor:
        """Return the last layer's output (1, length, hidden) of tokens (1, length) and the features of `Vision`.

        Several observations at a time, (batch, length), have features (1 + levels, cameras, batch, tokens, hidden).
        """
        length = tokens.shape[1]
        language: Any = self.policy.get_submodule(self.root).language_model
        angles = (self.cos[:, :length], self.sin[:, :length])
        seen = self.causal[:length, :length] & token_mask[:, None, None, :]
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        hidden = self._at_images(language.embed_tokens(tokens), image_features[0], _second)
        for index, layer in enumerate(language.layers):
            hidden = layer(hidden, position_embeddings=angles, attention_mask=mask)
            if index + 1 < image_features.shape[0]:
                hidden = self._at_images(hidden, image_features[index + 1], torch.add)
        return hidden

    def _at_images(
        self, hidden: Tensor, features: Tensor, combine: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Return ``hidden`` with ``combine(hidden, features)`` at the image tokens."""
        parts = []
        for (start, end), (first, last), own in zip(
            self.layout.texts, self.layout.images, features, strict=False
        ):
            own = own if own.dim() == 3 else own[None]
            parts += [hidden[:, start:end], combine(hidden[:, first:last], own)]
        return torch.cat([*parts, hidden[:, self.layout.images[-1][1] :]], dim=1)


def _second(_first: Tensor, second: Tensor) -> Tensor:
    return second


@contextmanager
def tap_language(policy: nn.Module, callback: AttentionCallback) -> Iterator[None]:
    """Show ``callback`` the queries, keys and mask of every attention of the language model while the block runs."""
    original = modeling_qwen3_vl.eager_attention_forward
    names = {
        id(module): f"{name}.q_proj"
        for name, module in policy.named_modules()
        if isinstance(module, modeling_qwen3_vl.Qwen3VLTextAttention)
    }

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any
    ) -> Any:
        keys = modeling_qwen3_vl.repeat_kv(key, module.num_key_value_groups)
        callback(names[id(module)], query, keys, mask[:, 0] == 0)
        return original(module, query, key, value, mask, **options)

    with mock.patch.object(modeling_qwen3_vl, "eager_attention_forward", attend):
        yield
