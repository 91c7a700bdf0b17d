"""Random-weight GR00T N1.7 checkpoints of any size, built offline through lerobot's own classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.groot.configuration_groot import GrootConfig
from lerobot.policies.groot.groot_n1_7 import GR00TN17, GR00TN17Config
from lerobot.policies.groot.modeling_groot import GrootPolicy
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLVideoProcessor,
)

from quantvla.families.groot.interface import (
    BACKBONE_DIRECTORY,
    BASE_DIRECTORY,
    ENCODE_STEP,
    PACK_STEP,
)
from quantvla.families.lerobot_interface import TOKENIZER_DIRECTORY
from quantvla.testing.statistics import random_statistics
from quantvla.testing.tokenizer import byte_level_bpe

_SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)
"""What Qwen3-VL's template makes of one message of images and text."""


@dataclass(frozen=True)
class GrootSize:
    """Dimensions of a GR00T. The defaults are small; state and action are not as long as in GR00T N1.5, which lerobot
    would take for that."""

    vision_hidden: int = 48
    vision_mlp: int = 96
    vision_depth: int = 3
    vision_heads: int = 4
    position_embeddings: int = 2304
    deepstack: tuple[int, ...] = (0, 1)
    text_hidden: int = 64
    text_mlp: int = 128
    text_layers: int = 3
    text_heads: int = 4
    text_key_value_heads: int = 2
    text_head_dim: int = 32
    rope_section: tuple[int, int, int] = (6, 5, 5)
    vocabulary: int = 640
    mixer_layers: int = 2
    blocks: int = 4
    heads: int = 4
    head_dim: int = 16
    output: int = 32
    dropout: float = 0.2
    embodiments: int = 12
    embodiment: str = "new_embodiment"
    embodiment_numbers: Mapping[str, int] | None = None
    """Which weights an embodiment has; None: as lerobot numbers them."""
    padded: int = 24
    model_chunk: int = 10
    image: tuple[int, int] = (64, 64)
    crop: tuple[int, int] = (58, 58)
    cameras: tuple[str, ...] = ("observation.images.front", "observation.images.wrist")
    camera_height: int = 48
    camera_width: int = 64
    state_dim: int = 5
    action_dim: int = 4
    chunk: int = 8
    execute: int = 8
    denoise_steps: int = 4
    options: dict[str, Any] = field(default_factory=dict)


FULL_SIZE = GrootSize(
    vision_hidden=1024, vision_mlp=4096, vision_depth=24, vision_heads=16, deepstack=(5, 11, 17),
    text_hidden=2048, text_mlp=6144, text_layers=16, text_heads=16, text_key_value_heads=8,
    text_head_dim=128, rope_section=(24, 20, 20), vocabulary=151936, mixer_layers=4, blocks=32,
    heads=32, head_dim=48, output=1024, embodiments=32, padded=132, model_chunk=40,
    image=(256, 256), crop=(230, 230), camera_height=256, camera_width=256, state_dim=7,
    action_dim=7, chunk=40, execute=40,
)  # fmt: skip


def make_tokenizer(texts: tuple[str, ...], vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on ``texts``, with Qwen3-VL's special tokens and prompt."""
    tokenizer = byte_level_bpe(texts * 4, vocabulary, _SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        chat_template=_CHAT_TEMPLATE,
        extra_special_tokens={
            "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>",
        },
    )  # fmt: skip


def write_processor(directory: Path, size: GrootSize, texts: tuple[str, ...]) -> PreTrainedTokenizerFast:  # fmt: skip
    """Write tokenizer, image and video processor to ``directory``; return the tokenizer."""
    tokenizer = make_tokenizer(texts, size.vocabulary)
    tokenizer.save_pretrained(directory)
    pixels = {"shortest_edge": 32 * 32, "longest_edge": 4096 * 4096}
    shared = {
        "patch_size": 16,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    Qwen2VLImageProcessor(size=pixels, **shared).save_pretrained(directory)
    Qwen3VLVideoProcessor(size=pixels, **shared).save_pretrained(directory)
    return tokenizer


def write_backbone(directory: Path, size: GrootSize, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the vision-language model's configuration (no weights)."""
    number = tokenizer.convert_tokens_to_ids
    Qwen3VLConfig(
        image_token_id=number("<|image_pad|>"), video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"), vision_end_token_id=number("<|vision_end|>"),
        tie_word_embeddings=True,
        text_config={
            "hidden_size": size.text_hidden, "intermediate_size": size.text_mlp,
            "num_hidden_layers": size.text_layers + 1, "num_attention_heads": size.text_heads,
            "num_key_value_heads": size.text_key_value_heads, "head_dim": size.text_head_dim,
            "vocab_size": size.vocabulary, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
            "rope_theta": 5e6, "tie_word_embeddings": True,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": list(size.rope_section), "rope_type": "default"},
        },
        vision_config={
            "depth": size.vision_depth, "hidden_size": size.vision_hidden, "intermediate_size": size.vision_mlp,
            "num_heads": size.vision_heads, "num_position_embeddings": size.position_embeddings, "out_hidden_size": size.text_hidden,
            "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "deepstack_visual_indexes": list(size.deepstack),
        },
    ).save_pretrained(directory)  # fmt: skip


def make_base_config(size: GrootSize, backbone: str) -> GR00TN17Config:
    """Return the base model's configuration; its vision-language model is called ``backbone``."""
    width = size.heads * size.head_dim
    transformer = {"positional_embeddings": None, "dropout": size.dropout, "final_dropout": True}
    mixer_heads = size.text_hidden // size.head_dim
    return GR00TN17Config(
        model_name=backbone, backbone_model_type="qwen", model_dtype="float32", dtype="float32",
        architectures=["Gr00tN1d7"], backbone_embedding_dim=size.text_hidden, select_layer=size.text_layers,
        hidden_size=size.output, input_embedding_dim=width, max_seq_len=64,
        max_num_embodiments=size.embodiments, max_state_dim=size.padded, max_action_dim=size.padded,
        action_horizon=size.model_chunk, num_inference_timesteps=size.denoise_steps,
        diffusion_model_cfg={
            **transformer, "num_layers": size.blocks, "num_attention_heads": size.heads,
            "attention_head_dim": size.head_dim, "norm_type": "ada_norm", "output_dim": size.output,
            "interleave_self_attention": True,
        },
        vl_self_attention_cfg={
            **transformer, "num_layers": size.mixer_layers, "num_attention_heads": mixer_heads,
            "attention_head_dim": size.head_dim,
        },
    )  # fmt: skip


def make_config(directory: Path, size: GrootSize) -> GrootConfig:
    """Return the policy's configuration; its base model is in ``directory / "base"``."""
    camera = PolicyFeature(FeatureType.VISUAL, (3, size.camera_height, size.camera_width))
    return GrootConfig(
        base_model_path=str(directory / BASE_DIRECTORY), embodiment_tag=size.embodiment,
        use_bf16=False, device="cpu",
        input_features={
            **dict.fromkeys(size.cameras, camera),
            "observation.state": PolicyFeature(FeatureType.STATE, (size.state_dim,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (size.action_dim,))},
        chunk_size=size.chunk, n_action_steps=size.execute, max_state_dim=size.padded,
        max_action_dim=size.padded, **size.options,
    )  # fmt: skip


def save_processors(
    config: GrootConfig, size: GrootSize, directory: Path, statistics: Mapping[str, dict[str, Tensor]]
) -> None:  # fmt: skip
    """Write both pipelines."""
    before, after = make_pre_post_processors(config, dataset_stats=dict(statistics))
    steps = {getattr(type(step), "_registry_name", ""): step for step in before.steps}
    encode, pack = steps[ENCODE_STEP], steps[PACK_STEP]
    encode.image_target_size, encode.image_crop_size = list(size.image), list(size.crop)
    if size.embodiment_numbers is not None:
        pack.embodiment_mapping = dict(size.embodiment_numbers)
    before.save_pretrained(directory)
    after.save_pretrained(directory)


def liven_(policy: nn.Module) -> None:
    """Give weights of one per embodiment their bias, and every path weights that a test can see."""
    for name, parameter in policy.named_parameters():
        if name.endswith((".b", "norm1.linear.bias")):
            nn.init.normal_(parameter, std=0.1)
        elif name.endswith(".W"):
            nn.init.normal_(parameter, std=0.2)


def make_policy(directory: Path, size: GrootSize, texts: tuple[str, ...]) -> GrootPolicy:
    """Return lerobot's policy with random weights; write what it needs beside its weights to ``directory``."""
    tokenizer = write_processor(directory / TOKENIZER_DIRECTORY, size, texts)
    write_backbone(directory / BACKBONE_DIRECTORY, size, tokenizer)
    base = make_base_config(size, str(directory / BACKBONE_DIRECTORY))
    raw = GR00TN17(base, load_backbone_weights=False).float()
    raw.save_pretrained(directory / BASE_DIRECTORY)
    policy = GrootPolicy(make_config(directory, size)).eval()
    base.model_name = BACKBONE_DIRECTORY
    base.save_pretrained(directory / BASE_DIRECTORY)
    (directory / BASE_DIRECTORY / "model.safetensors").unlink()
    return policy


def save_checkpoint(
    policy: GrootPolicy, size: GrootSize, statistics: Mapping[str, dict[str, Tensor]], directory: Path
) -> None:  # fmt: skip
    """Write ``policy`` and its processors in lerobot's layout to the directory that `make_policy` wrote to."""
    config = policy.config
    absolute, config.base_model_path = config.base_model_path, BASE_DIRECTORY
    policy.save_pretrained(directory)
    config.base_model_path = absolute
    save_processors(config, size, directory, statistics)


def write_random_checkpoint(
    directory: Path,
    size: GrootSize | None = None,
    *,
    seed: int = 0,
    texts: tuple[str, ...] = ("push the red block", "open the door"),
) -> Path:
    """Write a complete LeRobot checkpoint with random weights, its base model's configuration in it; return its directory."""
    size = size or GrootSize()
    torch.manual_seed(seed)
    policy = make_policy(directory, size, texts)
    liven_(policy)
    statistics = random_statistics(size.state_dim, size.action_dim, seed)
    save_checkpoint(policy, size, statistics, directory)
    return directory
