"""Random-weight pi0 and pi0.5 checkpoints of any size, built offline through lerobot's own classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors
from lerobot.processor import tokenizer_processor
from tokenizers import processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from quantvla.families.lerobot_interface import TOKENIZER_DIRECTORY
from quantvla.families.pi import KINDS, Gemma, Widths, widths_in_place
from quantvla.testing.statistics import random_statistics
from quantvla.testing.tokenizer import byte_level_bpe

_SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<image>")
_NUMBERS = " ".join(map(str, range(256)))


_TINY = Widths(
    language=Gemma(width=64, depth=2, mlp_dim=128, num_kv_heads=1, head_dim=16),
    expert=Gemma(width=32, depth=2, mlp_dim=64, num_kv_heads=1, head_dim=16),
    vocabulary=640, expert_vocabulary=8, vision_width=64, vision_mlp=96, vision_depth=1,
)  # fmt: skip


@dataclass(frozen=True)
class PiSize:
    """Dimensions of a pi policy. The defaults are small; heads stay 8, as lerobot has them."""

    widths: Widths = _TINY
    image_size: int = 56
    cameras: tuple[str, ...] = ("observation.images.front", "observation.images.wrist")
    camera_height: int = 48
    camera_width: int = 64
    state_dim: int = 5
    action_dim: int = 4
    chunk: int = 8
    execute: int = 4
    prompt_length: int = 48
    denoise_steps: int = 10
    options: dict[str, Any] = field(default_factory=dict)


FULL_SIZE = PiSize(
    widths=Widths(
        language=Gemma(width=2048, depth=18, mlp_dim=16384, num_kv_heads=1, head_dim=256),
        expert=Gemma(width=1024, depth=18, mlp_dim=4096, num_kv_heads=1, head_dim=256),
        vocabulary=257152, expert_vocabulary=257152,
        vision_width=1152, vision_mlp=4304, vision_depth=27,
    ),
    image_size=224, camera_height=224, camera_width=224, state_dim=7, action_dim=7,
    chunk=50, execute=50, prompt_length=200,
)  # fmt: skip


def make_tokenizer(texts: tuple[str, ...], vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on ``texts`` and numbers, with PaliGemma's special tokens."""
    prompts = [f"Task: {text}, State: {_NUMBERS};\nAction: " for text in texts]
    tokenizer = byte_level_bpe(prompts * 4, vocabulary, _SPECIAL_TOKENS, "<unk>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", _SPECIAL_TOKENS.index("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        unk_token="<unk>",
    )  # fmt: skip


def make_config(kind: str, size: PiSize) -> Any:
    """Return the policy's configuration."""
    camera = PolicyFeature(FeatureType.VISUAL, (3, size.camera_height, size.camera_width))
    return make_policy_config(
        kind, device="cpu",
        input_features={
            **dict.fromkeys(size.cameras, camera),
            "observation.state": PolicyFeature(FeatureType.STATE, (size.state_dim,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (size.action_dim,))},
        chunk_size=size.chunk, n_action_steps=size.execute, num_inference_steps=size.denoise_steps,
        image_resolution=(size.image_size, size.image_size),
        tokenizer_max_length=size.prompt_length, **size.options,
    )  # fmt: skip


def save_processors(config: Any, size: PiSize, directory: Path, *, seed: int, texts: tuple[str, ...]) -> None:  # fmt: skip
    """Write both pipelines, and the tokenizer, which lerobot names but does not save, as ``tokenizer/``."""
    tokenizer = make_tokenizer(texts, size.widths.vocabulary)
    tokenizer.save_pretrained(directory / TOKENIZER_DIRECTORY)
    with mock.patch.object(
        tokenizer_processor.AutoTokenizer, "from_pretrained", lambda _name: tokenizer
    ):
        before, after = make_pre_post_processors(
            config, dataset_stats=random_statistics(size.state_dim, size.action_dim, seed)
        )
    before.save_pretrained(directory)
    after.save_pretrained(directory)


def liven_(policy: nn.Module) -> None:
    """Give zero-initialized modulations weights, without which the time has no effect on a random policy."""
    for name, parameter in policy.named_parameters():
        if name.endswith("norm.dense.weight"):
            nn.init.normal_(parameter, std=0.1)


def write_random_checkpoint(
    kind: str,
    directory: Path,
    size: PiSize | None = None,
    *,
    seed: int = 0,
    texts: tuple[str, ...] = ("push the red block", "open the door"),
) -> Path:
    """Write a complete LeRobot checkpoint of a ``pi0`` or ``pi05`` with random weights; return its directory."""
    size = size or PiSize()
    torch.manual_seed(seed)
    config = make_config(kind, size)
    with widths_in_place(KINDS[kind], size.widths):
        policy = get_policy_class(kind)(config).eval()
    liven_(policy)
    policy.save_pretrained(directory)
    save_processors(config, size, directory, seed=seed, texts=texts)
    return directory
