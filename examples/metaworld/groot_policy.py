"""The small GR00T of this example (lerobot's GR00T N1.7 classes): its size, its untrained checkpoint, how it is trained.

What tells it from the small SmolVLA: the action head is a diffusion transformer, whose norms take scale and shift from
the time (AdaLN) and whose blocks attend in turn to the text, to themselves, to the images, to themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from robot import CAMERA_KEYS, CHUNK_SIZE, EXECUTED_STEPS, IMAGE_SIZE, VOCAB_SIZE, instructions
from torch import Tensor, nn

from quantvla.evaluate.metaworld import ACTION_DIM, STATE_DIM
from quantvla.families.base import LoadedPolicy
from quantvla.staged import stage_tensors
from quantvla.testing.groot import GrootSize, make_policy, save_checkpoint

SIZE = GrootSize(
    vision_hidden=160,
    vision_mlp=448,
    vision_depth=4,
    vision_heads=5,
    position_embeddings=(IMAGE_SIZE // 16) ** 2,
    deepstack=(1,),
    text_hidden=192,
    text_mlp=384,
    text_layers=3,
    text_heads=3,
    text_key_value_heads=1,
    text_head_dim=64,
    rope_section=(12, 10, 10),
    vocabulary=VOCAB_SIZE,
    mixer_layers=1,
    blocks=8,
    heads=4,
    head_dim=32,
    output=128,
    dropout=0.0,
    embodiments=1,
    embodiment="metaworld",
    embodiment_numbers={"metaworld": 0},
    padded=max(STATE_DIM, ACTION_DIM),
    model_chunk=CHUNK_SIZE,
    image=(IMAGE_SIZE, IMAGE_SIZE),
    crop=(IMAGE_SIZE, IMAGE_SIZE),
    cameras=CAMERA_KEYS,
    camera_height=IMAGE_SIZE,
    camera_width=IMAGE_SIZE,
    state_dim=STATE_DIM,
    action_dim=ACTION_DIM,
    chunk=CHUNK_SIZE,
    execute=EXECUTED_STEPS,
    denoise_steps=4,
)
"""Every ``in_features`` of the language model and the diffusion transformer is a multiple of 64, the quantization block."""


def write_untrained(directory: Path, statistics: Mapping[str, dict[str, Tensor]]) -> None:
    """Write a checkpoint with random weights, its base model's configuration and its tokenizer."""
    sentences = tuple(text.lower() for text in instructions())  # as the policy reads them
    policy = make_policy(directory, SIZE, sentences)
    spread_(policy)
    save_checkpoint(policy, SIZE, statistics, directory)


def spread_(policy: nn.Module) -> None:
    """Draw an embodiment's weights anew, so that a layer's output is about as large as its input.

    lerobot draws them as small as for a width of 2500.
    """
    for name, parameter in policy.named_parameters():
        if name.endswith(".W"):
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)


class GrootObjective(nn.Module):
    """Trains the policy through the stages that it is compiled from; see `learner.Objective`."""

    def __init__(self, loaded: LoadedPolicy) -> None:
        """Train the policy in ``loaded``; the prompt's last token and the state are the summary of a prefix."""
        super().__init__()
        self.policy = loaded.policy
        self.loaded = loaded
        self._derived = [
            module
            for stage in loaded.stages
            for module in stage.module.modules()
            if hasattr(module, "derive_")
        ]
        self.summary_dim = SIZE.text_hidden + SIZE.padded

    def context(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the last token's features with the state, and the inputs of the denoise stage that the time leaves alone."""
        for module in self._derived:
            module.derive_()
        images = batch["images"]  # (B, cameras, 3, height, width)
        (features,) = self._run("vision", images=images.flatten(0, 1)).values()
        features = features.unflatten(1, images.shape[:2]).transpose(1, 2)
        known = self._run(
            "prefix",
            image_features=features,
            tokens=batch["tokens"],
            token_mask=batch["mask"],
            state=batch["state"],
        )
        mask = known["text_mask"]
        last = torch.arange(mask.shape[1]).mul(mask).argmax(dim=1)
        token = known["text_context"][torch.arange(len(mask)), last]
        return torch.cat((token, batch["state"]), dim=1), known

    def velocity(self, context: dict[str, Tensor], noisy: Tensor, time: Tensor) -> Tensor:
        """Run the diffusion transformer on every draw, as so many observations."""
        repeated = {
            name: value.repeat_interleave(noisy.shape[1], dim=0) for name, value in context.items()
        }
        found = self._run("denoise", **repeated, x=noisy.flatten(0, 1), timestep=time.flatten())
        return found["velocity"].float().view(noisy.shape)

    def _run(self, stage: str, **tensors: Tensor) -> dict[str, Tensor]:
        return stage_tensors(self.loaded.stage(stage), tensors)
