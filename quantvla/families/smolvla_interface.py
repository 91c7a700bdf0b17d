"""What a SmolVLA checkpoint asks of the outside: cameras, preprocessing, sampler, tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lerobot.configs.types import NormalizationMode
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from transformers import AutoTokenizer

from quantvla.families.base import Interface
from quantvla.families.lerobot_checkpoint import (
    POSTPROCESSOR_FILE,
    PREPROCESSOR_FILE,
    find_step,
    processor_steps,
    refuse_unknown_steps,
    statistics,
)
from quantvla.runtime.errors import explain
from quantvla.runtime.manifest import (
    ActionSpec,
    CameraSpec,
    EulerSampler,
    Images,
    Normalize,
    Tokenize,
    Unnormalize,
    VectorSpec,
)

STATE_KEY, ACTION_KEY, TASK_KEY = "observation.state", "action", "task"
_TOKENIZER_FILE = "tokenizer.json"
_PREPROCESSOR_STEPS = frozenset(
    {
        "rename_observations_processor",
        "to_batch_processor",
        "smolvla_new_line_processor",
        "tokenizer_processor",
        "device_processor",
        "normalizer_processor",
    }
)
_POSTPROCESSOR_STEPS = frozenset({"unnormalizer_processor", "device_processor"})


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
    before = processor_steps(directory, PREPROCESSOR_FILE)
    after = processor_steps(directory, POSTPROCESSOR_FILE)
    refuse_unknown_steps(before, _PREPROCESSOR_STEPS, directory / PREPROCESSOR_FILE)
    refuse_unknown_steps(after, _POSTPROCESSOR_STEPS, directory / POSTPROCESSOR_FILE)
    normalizer = find_step(before, "normalizer_processor", PREPROCESSOR_FILE)
    unnormalizer = find_step(after, "unnormalizer_processor", POSTPROCESSOR_FILE)
    state, action = config.robot_state_feature, config.action_feature
    if state is None or action is None:
        raise explain(
            directory / "config.json",
            "has no state or no action feature",
            remedy="use a policy with both",
        )
    cameras = _cameras(directory, config, before)
    tokenizer = AutoTokenizer.from_pretrained(config.vlm_model_name)
    collected = statistics(normalizer) | statistics(unnormalizer)
    return Interface(
        preprocess=_preprocess(directory, config, before, cameras, normalizer.config, int(tokenizer.pad_token_id)),
        postprocess=(
            Unnormalize(key=ACTION_KEY, mode=_mode(unnormalizer.config, "ACTION"),
                        eps=float(unnormalizer.config.get("eps", 1e-8)), dim=int(action.shape[0])),
        ),
        statistics={key: collected[key] for key in (STATE_KEY, ACTION_KEY) if key in collected},
        cameras=cameras,
        state=VectorSpec(key=STATE_KEY, dim=int(state.shape[0])),
        task_key=TASK_KEY,
        action=ActionSpec(horizon=config.chunk_size, execute=config.n_action_steps, dim=int(action.shape[0])),
        sampler=_sampler(config),
        files={_TOKENIZER_FILE: tokenizer.backend_tokenizer.to_str().encode()},
    )  # fmt: skip


def _cameras(
    directory: Path, config: SmolVLAConfig, before: tuple[Any, ...]
) -> tuple[CameraSpec, ...]:
    renames = (
        find_step(before, "rename_observations_processor", PREPROCESSOR_FILE).config.get(
            "rename_map"
        )
        or {}
    )
    robot_name = {policy: robot for robot, policy in renames.items()}
    if renames.get(STATE_KEY) or STATE_KEY in robot_name:
        raise explain(
            directory / PREPROCESSOR_FILE,
            "renames the state",
            got=renames,
            remedy=f"record it as {STATE_KEY}",
        )
    keys = [key for key in config.image_features if ".empty_camera_" not in key]
    return tuple(
        CameraSpec(key=robot_name.get(key, key), height=int(shape[1]), width=int(shape[2]))
        for key in keys
        for shape in [config.image_features[key].shape]
    )


def _preprocess(
    directory: Path, config: SmolVLAConfig, before: tuple[Any, ...], cameras: tuple[CameraSpec, ...],
    normalizer: dict[str, Any], pad_id: int,
) -> tuple[Images | Normalize | Tokenize, ...]:  # fmt: skip
    if _mode(normalizer, "VISUAL") != "identity":
        raise explain(
            directory / PREPROCESSOR_FILE,
            "normalizes images, which SmolVLA does inside the policy",
            got=_mode(normalizer, "VISUAL"),
            remedy="train with VISUAL: IDENTITY",
        )
    resize = image_size(config) if config.resize_imgs_with_padding is not None else None
    tokenizer = find_step(before, "tokenizer_processor", PREPROCESSOR_FILE).config
    return (
        Images(keys=tuple(c.key for c in cameras), output="images", resize=resize, pad_value=0.0,
               scale=2.0, offset=-1.0),
        Normalize(key=STATE_KEY, output="state", mode=_mode(normalizer, "STATE"),
                  eps=float(normalizer.get("eps", 1e-8)), pad_to=config.max_state_dim),
        Tokenize(key=TASK_KEY, file=_TOKENIZER_FILE, suffix="\n",
                 max_length=int(tokenizer.get("max_length", config.tokenizer_max_length)),
                 pad_id=pad_id, tokens="tokens", mask="token_mask"),
    )  # fmt: skip


def _mode(config: dict[str, Any], feature: str) -> Any:
    modes = config.get("norm_map", {})
    return NormalizationMode(modes.get(feature, "IDENTITY")).value.lower()


def _sampler(config: SmolVLAConfig) -> EulerSampler:
    step = -1.0 / config.num_steps
    return EulerSampler(
        stage="denoise", state="x", time="timestep", velocity="velocity",
        timesteps=tuple(1.0 + index * step for index in range(config.num_steps)),
        step=step, noise_shape=(1, config.chunk_size, config.max_action_dim),
    )  # fmt: skip
