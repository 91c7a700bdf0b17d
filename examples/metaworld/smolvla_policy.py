"""The small SmolVLA of this example: its size, its untrained checkpoint, and how it is trained.

LeRobot's SmolVLA needs a VLM directory (architecture and tokenizer) beside its weights and names it by a path that
transformers resolves against the working directory. In the checkpoint it is ``vlm``, which means *relative to the
checkpoint directory*; the README shows the overrides that unmodified lerobot needs so that the directory can be moved.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.common.vla_utils import make_att_2d_masks
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from robot import CAMERA_KEYS, CHUNK_SIZE, EXECUTED_STEPS, IMAGE_SIZE, VOCAB_SIZE, instructions
from torch import Tensor, nn

from quantvla.evaluate.metaworld import ACTION_DIM, STATE_DIM, STATE_KEY
from quantvla.families.base import LoadedPolicy
from quantvla.testing.smolvla import VLM_DIRECTORY, SmolVLASize, save_checkpoint, write_vlm

SIZE = SmolVLASize(
    text_hidden=256,
    text_intermediate=512,
    layers=4,
    heads=4,
    key_value_heads=2,
    head_dim=64,
    vision_hidden=192,
    vision_intermediate=768,
    vision_layers=4,
    vision_heads=3,
    image_size=IMAGE_SIZE,
    patch_size=16,
    pixel_shuffle=2,
    vocabulary=VOCAB_SIZE,
)
"""Every ``in_features`` of the language model and the action expert is a multiple of 64, the quantization block."""


def policy_config(vlm: Path) -> SmolVLAConfig:
    """Return the policy configuration over the VLM directory ``vlm``."""
    camera = PolicyFeature(FeatureType.VISUAL, (3, IMAGE_SIZE, IMAGE_SIZE))
    return SmolVLAConfig(
        vlm_model_name=str(vlm),
        input_features={
            **dict.fromkeys(CAMERA_KEYS, camera),
            STATE_KEY: PolicyFeature(FeatureType.STATE, (STATE_DIM,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
        device="cpu",
        push_to_hub=False,
        chunk_size=CHUNK_SIZE,
        n_action_steps=EXECUTED_STEPS,
        resize_imgs_with_padding=(IMAGE_SIZE, IMAGE_SIZE),
        tokenizer_max_length=24,
        pad_language_to="max_length",
        num_vlm_layers=SIZE.layers,
        load_vlm_weights=False,
        freeze_vision_encoder=False,
        train_expert_only=False,
    )


def write_untrained(directory: Path, statistics: Mapping[str, dict[str, Tensor]]) -> None:
    """Write a checkpoint with random weights and its VLM directory."""
    write_vlm(directory / VLM_DIRECTORY, SIZE, instructions())
    policy = SmolVLAPolicy(policy_config(directory / VLM_DIRECTORY))
    save_checkpoint(policy, dict(statistics), directory)


class SmolVLAObjective(nn.Module):
    """The prefix once per observation, the action expert on many noise draws at once; see `learner.Objective`."""

    def __init__(self, loaded: LoadedPolicy) -> None:
        """Train the policy in ``loaded``; its state token is the summary of a prefix."""
        super().__init__()
        self.policy: Any = loaded.policy
        vlm = self.policy.model.vlm_with_expert
        self.summary_dim = vlm.config.text_config.hidden_size
        # On a CPU, faster than the fused kernel in bfloat16; not exported.
        vlm.get_vlm_model().vision_model.config._attn_implementation = "eager"

    def context(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        """Return the state token's last hidden state and the prefix's padding mask and cache."""
        model = self.policy.model
        images = list(batch["images"].unbind(1))
        present = [torch.ones(len(image), dtype=torch.bool) for image in images]
        embeddings, pad, attention = model.embed_prefix(
            images, present, batch["tokens"], batch["mask"], state=batch["state"]
        )
        (hidden, _), cache = model.vlm_with_expert.forward(
            attention_mask=make_att_2d_masks(pad, attention),
            position_ids=torch.cumsum(pad, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[embeddings, None],
            use_cache=True,
        )
        return hidden[:, -1], (pad, cache)

    def velocity(self, context: Any, noisy: Tensor, time: Tensor) -> Tensor:
        """Run the expert on every draw at once.

        The draws stand one after the other in the suffix; the mask lets each see the prefix and itself only, causally,
        which equals lerobot's ``denoise_step`` on every draw by itself.
        """
        model = self.policy.model
        pad, cache = context
        size, draws, chunk, width = noisy.shape
        suffix, _, _ = model.embed_suffix(
            noisy.reshape(size * draws, chunk, width), time.reshape(-1)
        )
        suffix = suffix.reshape(size, draws * chunk, -1)
        own = torch.kron(torch.eye(draws), torch.ones(chunk, chunk).tril()).bool()
        mask = torch.cat(
            [pad[:, None].expand(-1, draws * chunk, -1), own.expand(size, -1, -1)], dim=2
        )
        positions = pad.sum(dim=1, keepdim=True) + torch.arange(chunk).repeat(draws)
        (_, out), _ = model.vlm_with_expert.forward(
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            inputs_embeds=[None, suffix],
            use_cache=True,
        )
        with torch.autocast("cpu", enabled=False):
            velocity: Tensor = model.action_out_proj(out.float())
        return velocity.reshape(noisy.shape)
