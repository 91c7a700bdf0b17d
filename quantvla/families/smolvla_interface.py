"""What a SmolVLA checkpoint asks of the outside: cameras, preprocessing, sampler, tokenizer."""

from __future__ import annotations

from pathlib import Path

from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from transformers import AutoTokenizer

from quantvla.families import lerobot_interface as shared
from quantvla.families.base import Interface
from quantvla.families.lerobot_checkpoint import (
    POSTPROCESSOR_FILE,
    PREPROCESSOR_FILE,
    find_step,
    statistics,
)
from quantvla.runtime.errors import explain
from quantvla.runtime.manifest import Images, Tokenize


def image_size(config: SmolVLAConfig) -> tuple[int, int]:
    """Return the (height, width) the vision tower sees; lerobot stores (width, height)."""
    if config.resize_imgs_with_padding is not None:
        width, height = config.resize_imgs_with_padding
        return height, width
    sizes = {tuple(feature.shape[1:]) for feature in config.image_features.values()}
    if len(sizes) != 1:
        raise explain(
            "config.json",
            "cameras of different sizes without resize_imgs_with_padding",
            got=sorted(sizes),
            remedy="set resize_imgs_with_padding",
        )
    height, width = sizes.pop()
    return int(height), int(width)


def make_interface(directory: Path, config: SmolVLAConfig) -> Interface:
    """Return the outside of the policy in ``directory``."""
    before, after = shared.read_processors(directory, frozenset({"smolvla_new_line_processor"}))
    normalizer = find_step(before, "normalizer_processor", PREPROCESSOR_FILE)
    unnormalizer = find_step(after, "unnormalizer_processor", POSTPROCESSOR_FILE)
    state, dim = shared.features(directory, config)
    cameras = shared.cameras(directory, config, before)
    shared.refuse_normalized_images(directory, normalizer.config)
    tokenizer = AutoTokenizer.from_pretrained(config.vlm_model_name)
    tokenize = find_step(before, "tokenizer_processor", PREPROCESSOR_FILE).config
    resize = image_size(config) if config.resize_imgs_with_padding is not None else None
    return Interface(
        preprocess=(
            Images(keys=tuple(c.key for c in cameras), output="images", resize=resize,
                   pad_value=0.0, scale=2.0, offset=-1.0),
            shared.normalize_state(normalizer.config, "state", config.max_state_dim),
            Tokenize(key=shared.TASK_KEY, file=shared.TOKENIZER_FILE, suffix="\n",
                     max_length=int(tokenize.get("max_length", config.tokenizer_max_length)),
                     pad_id=int(tokenizer.pad_token_id), tokens="tokens", mask="token_mask"),
        ),
        postprocess=(shared.unnormalize_action(unnormalizer.config, dim),),
        statistics=shared.vector_statistics(statistics(normalizer) | statistics(unnormalizer)),
        cameras=cameras,
        state=state,
        task_key=shared.TASK_KEY,
        action=shared.action_spec(config, dim),
        sampler=shared.flow_sampler(config, config.num_steps),
        files={shared.TOKENIZER_FILE: tokenizer.backend_tokenizer.to_str().encode()},
    )  # fmt: skip
