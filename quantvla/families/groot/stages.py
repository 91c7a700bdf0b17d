"""The stages of GR00T N1.7: vision tower, what the action head reads, one denoise step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantvla.families.base import Stage, tensor_spec
from quantvla.families.groot.interface import Outside
from quantvla.families.qwen3_vl import Language, Layout, Vision
from quantvla.runtime.manifest import EulerSampler

BACKBONE = "_groot_model.backbone.model."
VLM = BACKBONE + "model"
VISION = VLM + ".visual"
"""Where the vision-language model, and its tower, are in lerobot's policy."""


class OneEmbodiment(nn.Module):
    """Linears with weights for every embodiment, of which one is chosen: (..., in) -> (..., out)."""

    weight: Tensor
    bias: Tensor

    def __init__(self, layer: Any, embodiment: int) -> None:
        super().__init__()
        self._of = (layer, embodiment)  # a tuple, so that the weights of all are not this module's
        with torch.no_grad():
            self.derive_()

    def derive_(self) -> None:
        """Take the weights from the policy again."""
        layer, embodiment = self._of
        self.weight, self.bias = layer.W[embodiment], layer.b[embodiment]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Prefix(Language):
    """Image features, tokens, token_mask (1, length), state (1, padded) -> what the action head reads.

    In torch several observations may stand for the 1, image features then as in `Language.read`.

    text_context (1, text tokens, hidden) with text_mask, image_context (1, image tokens, hidden), and
    state_features (1, 1, width).
    """

    def __init__(
        self, policy: Any, layout: Layout, prompt: tuple[int, ...], embodiment: int
    ) -> None:
        super().__init__(policy, VLM, layout, prompt)
        encoder = policy._groot_model.action_head.state_encoder
        self.first, self.second = (
            OneEmbodiment(layer, embodiment) for layer in (encoder.layer1, encoder.layer2)
        )

    def forward(
        self, image_features: Tensor, tokens: Tensor, token_mask: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        policy: Any = self.policy
        head = policy._groot_model.action_head
        hidden = head.vlln(self.read(image_features, tokens, token_mask))
        for block in getattr(head.vl_self_attention, "transformer_blocks", ()):
            hidden = block(hidden, attention_mask=token_mask)  # lerobot has no padding to mask
        texts = [slice(*stretch) for stretch in self.layout.texts]
        images = [slice(*stretch) for stretch in self.layout.images]
        return (
            torch.cat([hidden[:, own] for own in texts], dim=1),
            torch.cat([token_mask[:, own] for own in texts], dim=1),
            torch.cat([hidden[:, own] for own in images], dim=1),
            self.second(nn.functional.relu(self.first(state)))[:, None],
        )


class Denoise(nn.Module):
    """One call of the velocity field: contexts, x (batch, horizon, padded action), timestep (batch,) -> velocity like x.

    Here as everywhere in the runtime the time runs from 1 (noise) to 0 and the velocity points to
    the noise; GR00T's own run the other way.
    """

    def __init__(self, policy: Any, embodiment: int) -> None:
        super().__init__()
        self.policy = policy
        encoder, decoder = self.head.action_encoder, self.head.action_decoder
        self.encode, self.mix, self.out, self.decode, self.decoded = (
            OneEmbodiment(layer, embodiment)
            for layer in (encoder.W1, encoder.W2, encoder.W3, decoder.layer1, decoder.layer2)
        )

    @property
    def head(self) -> Any:
        """The action head, below ``policy``, where its linears have the names that sites have."""
        return self.policy._groot_model.action_head

    def forward(
        self, text_context: Tensor, text_mask: Tensor, image_context: Tensor, state_features: Tensor,
        x: Tensor, timestep: Tensor,
    ) -> Tensor:  # fmt: skip
        head = self.head
        dit, buckets = head.model, head.num_timestep_buckets
        time = torch.floor((1 - timestep) * buckets + 0.001)  # lerobot's are whole numbers
        hidden = torch.cat((state_features, self._actions(x, time)), dim=1)
        embedded = dit.timestep_encoder(time)
        for index, block in enumerate(dit.transformer_blocks):
            context, mask = image_context, None
            if index % (2 * dit.attend_text_every_n_blocks) == 0:
                context, mask = text_context, text_mask
            if index % 2:
                hidden = block(hidden, temb=embedded)
            else:
                hidden = block(
                    hidden, encoder_hidden_states=context, encoder_attention_mask=mask, temb=embedded
                )  # fmt: skip
        shift, scale = dit.proj_out_1(nn.functional.silu(embedded)).chunk(2, dim=1)
        hidden = dit.proj_out_2(dit.norm_out(hidden) * (1 + scale[:, None]) + shift[:, None])
        velocity: Tensor = self.decoded(nn.functional.relu(self.decode(hidden[:, -x.shape[1] :])))
        return -velocity

    def _actions(self, x: Tensor, time: Tensor) -> Tensor:
        """Return the tokens of noisy actions; what the time adds to them is apart, so that it can be a table."""
        actions = self.encode(x)
        width = actions.shape[-1]
        angles = self.head.action_encoder.pos_encoding(time[:, None])
        of_time = angles @ self.mix.weight[width:] + self.mix.bias
        tokens: Tensor = self.out(nn.functional.silu(actions @ self.mix.weight[:width] + of_time))
        if self.head.config.add_pos_embed:
            tokens = tokens + self.head.position_embedding.weight[: x.shape[1]]
        return tokens


def make_stages(policy: Any, made: Outside) -> tuple[Stage, ...]:
    """Return the policy cut into the graphs that an engine runs."""
    layout, interface, model = made.layout, made.interface, policy._groot_model
    config = model.config
    vision = model.backbone.visual.config
    cameras = len(interface.cameras)
    height, width = (side * vision.patch_size for side in layout.grid)
    image_tokens = layout.images[0][1] - layout.images[0][0]
    levels, hidden = len(vision.deepstack_visual_indexes), vision.out_hidden_size
    sampler: EulerSampler = interface.sampler
    images = tensor_spec("images", cameras, 3, height, width)
    features = tensor_spec("image_features", 1 + levels, cameras, image_tokens, hidden)
    tokens = tensor_spec("tokens", 1, layout.tokens, dtype="int64")
    mask = tensor_spec("token_mask", 1, layout.tokens, dtype="bool")
    state = tensor_spec("state", 1, config.max_state_dim)
    texts = layout.tokens - cameras * image_tokens
    context = (
        tensor_spec("text_context", 1, texts, hidden),
        tensor_spec("text_mask", 1, texts, dtype="bool"),
        tensor_spec("image_context", 1, cameras * image_tokens, hidden),
        tensor_spec("state_features", 1, 1, config.input_embedding_dim),
    )
    x, time = tensor_spec("x", *sampler.noise_shape), tensor_spec("timestep", 1)
    prefix = Prefix(policy, layout, made.prompt, made.embodiment)
    return (
        Stage("vision", Vision(policy, VISION, layout.grid), (images,), (features,)),
        Stage("prefix", prefix, (features, tokens, mask, state), context),
        Stage(
            "denoise", Denoise(policy, made.embodiment), (*context, x, time),
            (tensor_spec("velocity", *sampler.noise_shape),), repeat=len(sampler.timesteps),
            batch_axes=(0,) * (len(context) + 2),
        ),
    )  # fmt: skip
