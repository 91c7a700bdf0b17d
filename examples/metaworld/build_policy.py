"""Build the small SmolVLA of this example, and save and load it as a self-contained LeRobot checkpoint directory.

    <dir>/config.json model.safetensors policy_{pre,post}processor*.{json,safetensors} vlm/{config.json,tokenizer.json,...}

LeRobot's SmolVLA needs a VLM directory (architecture and tokenizer) beside its weights and names it by a path that
transformers resolves against the working directory. Here ``vlm_model_name`` and the tokenizer's ``tokenizer_name`` are
written as ``vlm``, which means *relative to the checkpoint directory*; ``load_policy`` shows the two overrides
that unmodified lerobot needs so that the directory can be moved.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from safetensors.torch import load_file, save_file

from quantvla.evaluate.metaworld import ACTION_DIM, CAMERA_KEY_PREFIX, CAMERAS, STATE_DIM, STATE_KEY
from quantvla.testing.smolvla import SmolVLASize, write_vlm

VLM_DIR = "vlm"
"""Value of ``vlm_model_name`` in the saved checkpoint: the VLM's directory, relative to the checkpoint's."""
IMAGE_SIZE = 128
PATCH_SIZE = 16
PIXEL_SHUFFLE = 2
VOCAB_SIZE = 512
CHUNK_SIZE = 16
EXECUTED_STEPS = 8
TEXT_LAYERS = 4
SIZE = SmolVLASize(
    text_hidden=256,
    text_intermediate=512,
    layers=TEXT_LAYERS,
    heads=4,
    key_value_heads=2,
    head_dim=64,
    vision_hidden=192,
    vision_intermediate=768,
    vision_layers=4,
    vision_heads=3,
    image_size=IMAGE_SIZE,
    patch_size=PATCH_SIZE,
    pixel_shuffle=PIXEL_SHUFFLE,
    vocabulary=VOCAB_SIZE,
)
"""Every ``in_features`` of the language model and the action expert is a multiple of 64, the quantization block."""


def save_vlm(out: Path) -> None:
    """Write the architecture and tokenizer of the vision-language model to ``out`` (no weights: they are in the policy).

    The tokenizer is trained on the 50 Meta-World instructions.
    """
    # Not at the top: it imports mujoco, which must find MUJOCO_GL set.
    from lerobot.envs.metaworld import TASK_DESCRIPTIONS

    write_vlm(out, SIZE, sorted(TASK_DESCRIPTIONS.values()))


def policy_config(vlm: Path) -> SmolVLAConfig:
    """Return the policy configuration over the VLM directory ``vlm``."""
    images = {
        CAMERA_KEY_PREFIX + camera: PolicyFeature(FeatureType.VISUAL, (3, IMAGE_SIZE, IMAGE_SIZE))
        for camera in CAMERAS
    }
    return SmolVLAConfig(
        vlm_model_name=str(vlm),
        input_features={**images, STATE_KEY: PolicyFeature(FeatureType.STATE, (STATE_DIM,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
        device="cpu",
        push_to_hub=False,
        chunk_size=CHUNK_SIZE,
        n_action_steps=EXECUTED_STEPS,
        resize_imgs_with_padding=(IMAGE_SIZE, IMAGE_SIZE),
        tokenizer_max_length=24,
        pad_language_to="max_length",
        num_vlm_layers=TEXT_LAYERS,
        load_vlm_weights=False,
        freeze_vision_encoder=False,
        train_expert_only=False,
    )


def build_policy(vlm: Path, seed: int = 0) -> SmolVLAPolicy:
    """Return an untrained policy, writing its VLM directory to ``vlm`` first. Every parameter but lm_head is trainable.

    lerobot freezes the last language layer because the expert reads only its keys and values; those would stay
    random here, where nothing is pretrained.
    """
    save_vlm(vlm)
    torch.manual_seed(seed)
    policy = SmolVLAPolicy(policy_config(vlm))
    for name, parameter in policy.named_parameters():
        parameter.requires_grad = "lm_head" not in name
    return policy


def save_policy(
    policy: SmolVLAPolicy, stats: Mapping[str, Mapping[str, torch.Tensor]], out: Path
) -> None:
    """Write ``policy`` in half precision with its pre- and postprocessors and VLM directory to ``out``.

    stats: ``observation.state`` and ``action`` -> mean, std (4,). The directory is replaced as a whole, by a rename.
    """
    partial = out.with_name(out.name + ".partial")
    previous = out.with_name(out.name + ".previous")
    _remove(partial)
    save_vlm(partial / VLM_DIR)
    config = policy.config
    absolute = config.vlm_model_name
    config.vlm_model_name = str(
        partial / VLM_DIR
    )  # the tokenizer step loads it while the pipelines are built
    plain_stats = {key: dict(value) for key, value in stats.items()}
    for pipeline in make_pre_post_processors(config, dataset_stats=plain_stats):
        pipeline.save_pretrained(partial)
    config.vlm_model_name = VLM_DIR
    config.save_pretrained(partial)
    config.vlm_model_name = absolute
    weights = {
        name: tensor.detach().half().contiguous() for name, tensor in policy.state_dict().items()
    }
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    _make_tokenizer_relative(partial / "policy_preprocessor.json")
    if out.exists():
        _remove(previous)
        out.replace(previous)
    partial.replace(out)
    _remove(previous)


def load_policy(directory: Path) -> tuple[SmolVLAPolicy, Any, Any]:
    """Return (policy in float32, preprocessor, postprocessor) of a checkpoint directory, wherever it lies.

    These are lerobot's own loaders. Raises ValueError if a weight is missing or unknown (lerobot would not notice).
    """
    vlm = str(directory / VLM_DIR)
    config = PreTrainedConfig.from_pretrained(directory)
    config.vlm_model_name = vlm
    policy = SmolVLAPolicy.from_pretrained(directory, config=config).float().eval()
    difference = set(load_file(directory / "model.safetensors")) ^ set(policy.state_dict())
    if difference:
        raise ValueError(
            f"{directory}: weights and config disagree, got {sorted(difference)[:4]}; export it again"
        )
    preprocessor, postprocessor = make_pre_post_processors(
        config,
        pretrained_path=str(directory),
        preprocessor_overrides={"tokenizer_processor": {"tokenizer_name": vlm}},
    )
    return policy, preprocessor, postprocessor


def _make_tokenizer_relative(path: Path) -> None:
    """Replace the absolute tokenizer path in a saved preprocessor by the one relative to the checkpoint directory."""
    pipeline = json.loads(path.read_text())
    for step in pipeline["steps"]:
        if step.get("registry_name") == "tokenizer_processor":
            step["config"]["tokenizer_name"] = VLM_DIR
    path.write_text(json.dumps(pipeline, indent=2) + "\n")


def _remove(directory: Path) -> None:
    """Delete a directory tree if it is there."""
    shutil.rmtree(directory, ignore_errors=True)
