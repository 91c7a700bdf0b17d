"""Random-weight SmolVLA checkpoints of any size, built offline through lerobot's own classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from quantvla.testing.tokenizer import byte_level_bpe

VLM_DIRECTORY = "vlm"
_SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<end_of_utterance>",
    "<fake_token_around_image>", "<image>", "<global-img>",
)  # fmt: skip


@dataclass(frozen=True)
class SmolVLASize:
    """Dimensions of a SmolVLA. The defaults are as small as its structure allows."""

    text_hidden: int = 64
    text_intermediate: int = 128
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    head_dim: int = 16
    expert_multiplier: float = 0.5
    vision_hidden: int = 48
    vision_intermediate: int = 96
    vision_layers: int = 2
    vision_heads: int = 4
    image_size: int = 64
    patch_size: int = 16
    pixel_shuffle: int = 2
    vocabulary: int = 512
    cameras: tuple[str, ...] = ("observation.images.front", "observation.images.wrist")
    camera_height: int = 48
    camera_width: int = 64
    state_dim: int = 5
    action_dim: int = 4
    chunk: int = 8
    execute: int = 4
    prompt_length: int = 16
    denoise_steps: int = 10


FULL_SIZE = SmolVLASize(
    text_hidden=960, text_intermediate=2560, layers=16, heads=15, key_value_heads=5, head_dim=64,
    expert_multiplier=0.75, vision_hidden=768, vision_intermediate=3072, vision_layers=12, vision_heads=12,
    image_size=512, patch_size=16, pixel_shuffle=4, vocabulary=49280, camera_height=512, camera_width=512,
    state_dim=6, action_dim=6, chunk=50, execute=50, prompt_length=48,
)  # fmt: skip


def make_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on ``texts``, with SmolVLM's special tokens."""
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(texts, vocabulary, _SPECIAL_TOKENS), bos_token="<|im_start|>", eos_token="<end_of_utterance>",
        pad_token="<|im_end|>", unk_token="<|endoftext|>",
        extra_special_tokens={
            "fake_image_token": "<fake_token_around_image>",
            "image_token": "<image>",
            "global_image_token": "<global-img>",
        },
    )  # fmt: skip


def write_vlm(directory: Path, size: SmolVLASize, texts: list[str]) -> None:
    """Write the VLM's configuration, tokenizer and processor (no weights) to ``directory``."""
    text = {
        "model_type": "llama", "hidden_size": size.text_hidden, "intermediate_size": size.text_intermediate,
        "num_hidden_layers": size.layers, "num_attention_heads": size.heads,
        "num_key_value_heads": size.key_value_heads, "head_dim": size.head_dim,
        "vocab_size": size.vocabulary, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 3, "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {
        "hidden_size": size.vision_hidden, "intermediate_size": size.vision_intermediate,
        "num_hidden_layers": size.vision_layers, "num_attention_heads": size.vision_heads,
        "image_size": size.image_size, "patch_size": size.patch_size,
    }  # fmt: skip
    config = SmolVLMConfig(
        text_config=text,
        vision_config=vision,
        scale_factor=size.pixel_shuffle,
        image_token_id=5,
        pad_token_id=2,
    )
    config.architectures = ["SmolVLMForConditionalGeneration"]
    config.save_pretrained(directory)
    SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(),
        tokenizer=make_tokenizer(texts, size.vocabulary),
        video_processor=SmolVLMVideoProcessor(),
        image_seq_len=(size.image_size // size.patch_size // size.pixel_shuffle) ** 2,
    ).save_pretrained(directory)


def make_config(directory: Path, size: SmolVLASize) -> SmolVLAConfig:
    """Return the policy's configuration; its VLM is expected in ``directory / "vlm"``."""
    camera = PolicyFeature(FeatureType.VISUAL, (3, size.camera_height, size.camera_width))
    return SmolVLAConfig(
        vlm_model_name=str(directory / VLM_DIRECTORY), load_vlm_weights=False, device="cpu",
        input_features={
            **dict.fromkeys(size.cameras, camera),
            "observation.state": PolicyFeature(FeatureType.STATE, (size.state_dim,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (size.action_dim,))},
        chunk_size=size.chunk, n_action_steps=size.execute, num_steps=size.denoise_steps,
        num_vlm_layers=size.layers, expert_width_multiplier=size.expert_multiplier,
        resize_imgs_with_padding=(size.image_size, size.image_size),
        tokenizer_max_length=size.prompt_length,
    )  # fmt: skip


def random_statistics(size: SmolVLASize, seed: int) -> dict[str, dict[str, Tensor]]:
    """Return made-up mean and standard deviation for state and action."""
    generator = torch.Generator().manual_seed(seed)
    dims = {"observation.state": size.state_dim, "action": size.action_dim}
    return {
        key: {
            "mean": torch.randn(dim, generator=generator),
            "std": torch.rand(dim, generator=generator) + 0.5,
        }
        for key, dim in dims.items()
    }


def save_checkpoint(
    policy: SmolVLAPolicy, statistics: dict[str, dict[str, Tensor]], directory: Path
) -> None:
    """Write policy and processors in lerobot's layout; the VLM is referred to by the relative name "vlm"."""
    before, after = make_pre_post_processors(policy.config, dataset_stats=statistics)
    for step in before.steps:
        if hasattr(step, "tokenizer_name"):
            step.tokenizer_name = VLM_DIRECTORY
    absolute = policy.config.vlm_model_name
    policy.config.vlm_model_name = VLM_DIRECTORY
    policy.save_pretrained(directory)
    policy.config.vlm_model_name = absolute
    before.save_pretrained(directory)
    after.save_pretrained(directory)


def write_random_checkpoint(
    directory: Path,
    size: SmolVLASize = SmolVLASize(),
    *,
    seed: int = 0,
    texts: tuple[str, ...] = ("push the red block", "open the door"),
) -> Path:
    """Write a complete LeRobot checkpoint with random weights and return its directory.

    Weights are scaled so that the expert reacts to its context (lerobot's initialization is kept).
    """
    torch.manual_seed(seed)
    write_vlm(directory / VLM_DIRECTORY, size, list(texts))
    policy = SmolVLAPolicy(make_config(directory, size)).eval()
    save_checkpoint(policy, random_statistics(size, seed), directory)
    return directory
