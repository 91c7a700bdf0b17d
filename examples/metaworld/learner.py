"""The training objective of the small SmolVLA: flow matching on several noise draws per observation, and the object head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from frames import Batch, Shard
from lerobot.policies.common.vla_utils import make_att_2d_masks
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor, nn

from quantvla.evaluate.metaworld import CAMERA_KEY_PREFIX, CAMERAS, STATE_KEY, find_task

OBJECT_SCALE = 10.0
"""Positions relative to the hand are a few decimetres: the head predicts them in decimetres."""


class Learner(nn.Module):
    """The policy and the training-only head; its forward pass is the loss, so that autocast and compile see one module."""

    def __init__(self, policy: SmolVLAPolicy) -> None:
        """Add the head that reads the state token: hidden -> object and goal positions (6)."""
        super().__init__()
        self.policy = policy
        self.head = nn.Linear(policy.model.vlm_with_expert.config.text_config.hidden_size, 6)

    def forward(
        self, batch: dict[str, Tensor], noise: Tensor, time: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return (flow-matching loss, object loss).

        batch: images (B, 3, 128, 128) in [0, 1] by camera key, observation.state (B, 4) and action (B, chunk, 4)
        normalized, tokens and mask (B, length), valid (B, chunk), objects (B, 6). noise: (B, draws, chunk,
        max_action_dim); time: (B, draws).
        """
        policy, model = self.policy, self.policy.model
        images, masks = policy.prepare_images(batch)
        embeddings, pad, attention = model.embed_prefix(
            images, masks, batch["tokens"], batch["mask"], state=policy.prepare_state(batch)
        )
        (hidden, _), cache = model.vlm_with_expert.forward(
            attention_mask=make_att_2d_masks(pad, attention),
            position_ids=torch.cumsum(pad, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[embeddings, None],
            use_cache=True,
        )
        actions = policy.prepare_action(batch)[:, None]
        noisy = time[..., None, None] * noise + (1 - time[..., None, None]) * actions
        velocity = self._denoise(pad, cache, noisy, time)
        used = self.policy.config.action_feature.shape[0]
        error = (velocity - (noise - actions))[..., :used].square()
        valid = batch["valid"][:, None, :, None].float().expand_as(error)
        flow = (error * valid).sum() / valid.sum()
        objects = F.smooth_l1_loss(
            self.head(hidden[:, -1]).float(), batch["objects"] * OBJECT_SCALE, beta=0.1
        )
        return flow, objects

    def _denoise(self, pad: Tensor, cache: Any, noisy: Tensor, time: Tensor) -> Tensor:
        """Run the expert on every draw at once: noisy (B, draws, chunk, dim), time (B, draws) -> velocity, as noisy.

        The draws stand one after the other in the suffix; the mask lets each see the prefix and itself only, causally,
        which equals lerobot's ``denoise_step`` on every draw by itself.
        """
        model = self.policy.model
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


class Collator:
    """Turns numpy batches into the tensors that the learner reads: normalization and tokens as the preprocessor does."""

    def __init__(
        self, policy: SmolVLAPolicy, stats: dict[str, dict[str, Any]], shards: list[Shard]
    ) -> None:
        """Tokenize each task's instruction once."""
        tokenizer = policy.model.vlm_with_expert.processor.tokenizer
        text = [find_task(shard.task).instruction + "\n" for shard in shards]
        length = policy.config.tokenizer_max_length
        coded = tokenizer(
            text, max_length=length, padding="max_length", padding_side="right", return_tensors="pt"
        )
        self._tokens, self._mask = coded["input_ids"], coded["attention_mask"].bool()
        self._stats = stats

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Return the tensors of one batch."""
        task = torch.from_numpy(batch.task)
        pixels = torch.from_numpy(batch.images).permute(0, 1, 4, 2, 3).float() / 255.0
        return {
            **{
                CAMERA_KEY_PREFIX + camera: pixels[:, index] for index, camera in enumerate(CAMERAS)
            },
            STATE_KEY: self._normalize(STATE_KEY, batch.states),
            "action": self._normalize("action", batch.actions),
            "tokens": self._tokens[task],
            "mask": self._mask[task],
            "valid": torch.from_numpy(batch.valid),
            "objects": torch.from_numpy(batch.objects),
        }

    def _normalize(self, key: str, value: Any) -> Tensor:
        stats = self._stats[key]
        return torch.from_numpy((value - stats["mean"]) / (stats["std"] + 1e-8))
