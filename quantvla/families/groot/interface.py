"""What a GR00T N1.7 checkpoint needs from elsewhere, and its pre- and postprocessing as data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import try_to_load_from_cache
from lerobot.policies.groot.configuration_groot import (
    infer_groot_n1_7_action_execution_horizon,
    infer_groot_n1_7_action_horizon,
)
from lerobot.policies.groot.groot_n1_7 import GR00TN17Config, _is_cosmos_reason2_backbone
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen3VLVideoProcessor

from quantvla.families import lerobot_interface as shared
from quantvla.families.base import Interface
from quantvla.families.lerobot_checkpoint import (
    POSTPROCESSOR_FILE,
    PREPROCESSOR_FILE,
    ProcessorStep,
    find_step,
    statistics,
)
from quantvla.families.qwen3_vl import Layout, find_images
from quantvla.runtime.errors import explain, nearest
from quantvla.runtime.manifest import ActionSpec, CameraSpec, EulerSampler
from quantvla.runtime.processing_steps import (
    FeatureStatistics,
    Normalize,
    PostprocessStep,
    Prompt,
    ResampledImages,
    Tokenize,
    Unnormalize,
)

PACK_STEP, ENCODE_STEP = "groot_n1_7_pack_inputs_v1", "groot_n1_7_vlm_encode_v1"
UNPACK_STEP, DECODE_STEP = "groot_action_unpack_unnormalize_v2", "groot_n1_7_action_decode_v1"
BASE_DIRECTORY, BACKBONE_DIRECTORY = "base", "backbone"
SENTENCE_TOKENS = 48
"""Tokens of the sentence and what follows it; lerobot takes any number, an engine needs one."""

_CONFIG, _PROCESSOR = "config.json", "processor_config.json"
_DEFAULT_SENTENCE = "Perform the task."
_TASK = "{task}"


# ---------------------------------------------------------------------------- files from elsewhere
@dataclass(frozen=True)
class Base:
    """The base model's configuration; ``carried``: what of it a checkpoint must have to load without it."""

    directory: Path
    config: GR00TN17Config
    carried: Mapping[str, bytes]


def find_base(directory: Path, name: str) -> Base:
    """Return the configuration of the base model that a checkpoint names.

    Looked for in the checkpoint (``base/``, or the name as a directory in it), as a path, and in
    what this machine has from a hub; the vision-language model's the same way (``backbone/``).
    Raises `QuantVLAError` when one is nowhere.
    """
    found = _find(directory, BASE_DIRECTORY, name, _CONFIG, "its base model's configuration")
    config = GR00TN17Config(**json.loads((found / _CONFIG).read_text()))
    carried = {
        f"{BASE_DIRECTORY}/{file}": (found / file).read_bytes()
        for file in (_CONFIG, _PROCESSOR)
        if (found / file).is_file()
    }
    if not _is_cosmos_reason2_backbone(config.model_name):  # lerobot knows that one's by heart
        what = "the configuration of its vision-language model"
        backbone = _find(directory, BACKBONE_DIRECTORY, config.model_name, _CONFIG, what)
        config.model_name, config.backbone_model_type = str(backbone), "qwen"
        carried[f"{BACKBONE_DIRECTORY}/{_CONFIG}"] = (backbone / _CONFIG).read_bytes()
    return Base(found, config, carried)


def _find(directory: Path, own: str, name: str, file: str, what: str) -> Path:
    for place in (directory / own, directory / name, Path(name).expanduser()):
        if (place / file).is_file():
            return place.resolve()
    cached = try_to_load_from_cache(name, file) if name.count("/") == 1 else None
    if isinstance(cached, str):
        return Path(cached).parent
    raise explain(
        directory / _CONFIG,
        f"{what} is not on this machine",
        got=name,
        remedy=f"copy that model's {file} into the checkpoint as `{own}/{file}`",
    )


@dataclass(frozen=True)
class Processor:
    """Tokenizer and image processor of the vision-language model; ``place``: what lerobot loads them from."""

    place: str
    tokenizer: PreTrainedTokenizerFast
    images: Any
    carried: Mapping[str, bytes]


def find_processor(directory: Path, before: shared.Steps) -> Processor:
    """Return the tokenizer and image processor, of the checkpoint (``tokenizer/``) or of this machine."""
    step = find_step(before, ENCODE_STEP, PREPROCESSOR_FILE)
    name = str(step.config.get("model_name"))
    place = shared.tokenizer_place(directory, name)
    tokenizer = shared.find_tokenizer(directory, name)
    try:
        parts = [
            part.from_pretrained(place, local_files_only=True)
            for part in (Qwen2VLImageProcessor, Qwen3VLVideoProcessor)
        ]
    except OSError as error:
        raise explain(
            directory / PREPROCESSOR_FILE, "its image and video processor are not on this machine",
            got=name,
            remedy=f"copy that model's preprocessor configurations into the checkpoint as "
            f"`{shared.TOKENIZER_DIRECTORY}/`",
        ) from error  # fmt: skip
    files = dict(shared.tokenizer_files(tokenizer))
    with TemporaryDirectory() as temporary:
        for part in parts:
            part.save_pretrained(temporary)
        for path in sorted(Path(temporary).iterdir()):
            files[f"{shared.TOKENIZER_DIRECTORY}/{path.name}"] = path.read_bytes()
    return Processor(place, tokenizer, parts[0], files)


def read_processors(directory: Path) -> tuple[shared.Steps, shared.Steps]:
    """Return the steps before and after the policy. Raises `QuantVLAError` for an unknown one."""
    own = {PACK_STEP, ENCODE_STEP, UNPACK_STEP, DECODE_STEP}
    relative = {"relative_actions_processor", "absolute_actions_processor"}
    return shared.read_processors(directory, frozenset(own | relative))


# ------------------------------------------------------------------------------------- interface
@dataclass(frozen=True)
class Outside:
    """The interface, the prompt that the stages are made for, and the embodiment."""

    interface: Interface
    layout: Layout
    prompt: tuple[int, ...]
    embodiment: int


def make_interface(
    directory: Path, config: Any, model: GR00TN17Config, before: shared.Steps, after: shared.Steps,
    processor: Processor,
) -> Outside:  # fmt: skip
    """Return the outside of the policy in ``directory``, whose base configuration is ``model``."""
    pack = find_step(before, PACK_STEP, PREPROCESSOR_FILE)
    encode = find_step(before, ENCODE_STEP, PREPROCESSOR_FILE).config
    state, dim = shared.features(directory, config)
    embodiment = _embodiment(directory, pack.config, model.max_num_embodiments)
    cameras = _in_order(directory, config, pack.config, shared.cameras(directory, config, before))
    images = _images(directory, encode, processor.images, cameras)
    template = _template(processor, len(cameras), images.size)
    prompt = tuple(processor.tokenizer(template.replace(_TASK, ""))["input_ids"])
    runs = find_images(prompt, processor.tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    patch = int(processor.images.patch_size)
    grid = (images.size[0] // patch, images.size[1] // patch)
    layout = Layout(runs[-1][1] + SENTENCE_TOKENS, runs, grid)
    known = statistics(pack)
    origin, absolute = shared.relative_actions(directory, before, after, state, dim)
    horizon = _horizon(config, model.action_horizon)
    decode, actions = _decode(directory, after, dim, horizon)
    tokenize = Tokenize(
        key=shared.TASK_KEY, file=shared.TOKENIZER_FILE, suffix="", max_length=layout.tokens,
        pad_id=int(processor.tokenizer.pad_token_id), tokens="tokens", mask="token_mask",
        prompt=Prompt(template=template, plain=bool(pack.config.get("formalize_language", True)), empty=_DEFAULT_SENTENCE),
    )  # fmt: skip
    interface = Interface(
        preprocess=(images, _state(directory, pack.config, known, config.max_state_dim), *origin, tokenize),
        postprocess=(decode, *absolute),
        statistics={**shared.vector_statistics(known), shared.ACTION_KEY: actions},
        cameras=cameras,
        state=state,
        task_key=shared.TASK_KEY,
        action=ActionSpec(horizon=horizon, execute=_execute(config, horizon), dim=dim),
        sampler=_sampler(model),
        files={shared.TOKENIZER_FILE: processor.tokenizer.backend_tokenizer.to_str().encode()},
    )  # fmt: skip
    return Outside(interface, layout, prompt, embodiment)


def _embodiment(directory: Path, pack: Mapping[str, Any], embodiments: int) -> int:
    """Return the number of the embodiment; lerobot would take number 0 for one it does not know."""
    tag, known = pack.get("embodiment_tag"), pack.get("embodiment_mapping") or {}
    if tag not in known:
        raise explain(
            directory / PREPROCESSOR_FILE, "its embodiment tag is not among those of the checkpoint",
            got=repr(tag), remedy=nearest(str(tag), known),
        )  # fmt: skip
    if not 0 <= int(known[tag]) < embodiments:
        raise explain(
            directory / PREPROCESSOR_FILE,
            f"embodiment {tag!r} has a number that the model has no weights for",
            got=known[tag],
            remedy=f"the base model has {embodiments}; use the one it was trained from",
        )
    return int(known[tag])


def _in_order(
    directory: Path, config: Any, pack: Mapping[str, Any], cameras: tuple[CameraSpec, ...]
) -> tuple[CameraSpec, ...]:
    """Return the cameras in the order of the prompt: the checkpoint's, or by name."""
    if int(pack.get("video_horizon") or 1) != 1:
        raise explain(
            directory / PREPROCESSOR_FILE, "takes several images of a camera at a time",
            got=pack["video_horizon"], remedy="only policies of one image a camera are supported",
        )  # fmt: skip
    names = [key for key in config.image_features if ".empty_camera_" not in key]
    known = dict(zip(names, cameras, strict=True))
    wanted = pack.get("video_modality_keys")
    if not wanted:
        return tuple(known[name] for name in sorted(names))
    own = {name.rpartition(".")[2]: name for name in names}
    own.setdefault("wrist_image", own.get("image2", ""))
    ordered = [own.get(key, "") for key in wanted]
    if sorted(ordered) != sorted(names):
        raise explain(
            directory / "config.json", f"expected the cameras that the checkpoint was trained with, {wanted}",
            got=names, remedy="name the policy's image features like them",
        )  # fmt: skip
    return tuple(known[name] for name in ordered)


def _images(
    directory: Path, encode: Mapping[str, Any], processor: Any, cameras: tuple[CameraSpec, ...]
) -> ResampledImages:
    """Return lerobot's resize, crop and resize, and the normalization of the image processor."""
    size = encode.get("image_target_size")
    if encode.get("use_albumentations") or size is None:
        raise explain(
            directory / PREPROCESSOR_FILE, "resizes images in a way that has no run-time form here",
            got="use_albumentations" if size else "no image_target_size",
            remedy="use a checkpoint with use_albumentations false and an image_target_size",
        )  # fmt: skip
    height, width = int(size[0]), int(size[1])
    _check_size(directory, processor, height, width)
    edge = int(encode.get("shortest_image_edge") or height)
    fraction = encode.get("crop_fraction")
    if fraction is None and encode.get("image_crop_size"):
        fraction = encode["image_crop_size"][0] / height
    crop = edge if fraction is None or not 0 < fraction < 1 else max(1, round(edge * fraction))
    (mean,), (deviation,) = (set(v) for v in (processor.image_mean, processor.image_std))
    return ResampledImages(
        keys=tuple(camera.key for camera in cameras), output="images",
        square=bool(encode.get("letter_box_transform")), first=(edge, edge), crop=(crop, crop),
        size=(height, width), scale=255 * processor.rescale_factor / deviation, offset=-mean / deviation,
    )  # fmt: skip


def _check_size(directory: Path, processor: Any, height: int, width: int) -> None:
    """Raise unless the image processor leaves an image of this size as it is and normalizes its channels alike."""
    unit = processor.patch_size * processor.merge_size
    least, most = processor.size["shortest_edge"], processor.size["longest_edge"]
    if height % unit or width % unit or not least <= height * width <= most:
        raise explain(
            directory / PREPROCESSOR_FILE,
            f"image_target_size must be a multiple of {unit} with {least} to {most} pixels",
            got=f"{height}x{width}", remedy="use the size the policy was trained with",
        )  # fmt: skip
    if len(set(processor.image_mean)) > 1 or len(set(processor.image_std)) > 1:
        raise explain(
            directory / PREPROCESSOR_FILE, "the image processor normalizes each colour differently",
            got=processor.image_mean, remedy="use the image processor of Qwen3-VL",
        )  # fmt: skip


def _template(processor: Processor, cameras: int, size: tuple[int, int]) -> str:
    """Return the prompt around the sentence: the tokenizer's chat template, image tokens written out."""
    content: list[dict[str, str]] = [{"type": "image"} for _ in range(cameras)]
    content.append({"type": "text", "text": _TASK})
    rendered = str(
        processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=False
        )
    )
    unit = processor.images.patch_size * processor.images.merge_size
    tokens = (size[0] // unit) * (size[1] // unit)
    return rendered.replace("<|image_pad|>", "<|image_pad|>" * tokens)


def _state(
    directory: Path, pack: Mapping[str, Any], known: Mapping[str, FeatureStatistics], pad_to: int
) -> Normalize:
    if not pack.get("normalize_min_max", True):
        return Normalize(
            key=shared.STATE_KEY, output="state", mode="identity", eps=0.0, pad_to=pad_to
        )
    own = known.get(shared.STATE_KEY)
    if own is None or own.min is None or own.max is None:
        raise explain(
            directory / PREPROCESSOR_FILE,
            f"has no statistics of the state for embodiment {pack.get('embodiment_tag')!r}",
            remedy="save the processors with the statistics of the robot's data set",
        )
    return Normalize(
        key=shared.STATE_KEY, output="state", mode="min_max", eps=1e-8, pad_to=pad_to,
        clip=bool(pack.get("clip_outliers", True)), flat_to_zero=True,
    )  # fmt: skip


def _decode(
    directory: Path, after: shared.Steps, dim: int, horizon: int
) -> tuple[PostprocessStep, FeatureStatistics]:
    """Return the step that undoes the normalization of actions, and its statistics."""
    decode = next((step for step in after if step.name == DECODE_STEP), None)
    if decode is not None:
        found, clip = _grouped_statistics(directory, decode, dim), True
    else:
        step = find_step(after, UNPACK_STEP, POSTPROCESSOR_FILE)
        _refuse_gripper(directory, step.config.get("libero_gripper_action"))
        clip = bool(step.config.get("clip_normalized_action"))
        whole = statistics(step).get(shared.ACTION_KEY)
        if whole is None or whole.min is None or whole.max is None:
            raise explain(
                directory / POSTPROCESSOR_FILE, "has no statistics of the actions",
                remedy="save the processors with the statistics of the robot's data set",
            )  # fmt: skip
        found = FeatureStatistics(
            **{n: v[:dim] for n in FeatureStatistics.__struct_fields__ if (v := getattr(whole, n))}
        )
    return (
        Unnormalize(key=shared.ACTION_KEY, mode="min_max", eps=1e-8, dim=dim, horizon=horizon, clip=clip),
        found,
    )  # fmt: skip


def _grouped_statistics(directory: Path, step: ProcessorStep, dim: int) -> FeatureStatistics:
    """Return the range of every action entry of a base checkpoint's groups, in the checkpoint's order."""
    _refuse_gripper(directory, step.config.get("action_decode_transform"))
    if step.config.get("use_relative_action"):
        raise explain(
            directory / POSTPROCESSOR_FILE, "decodes groups of relative actions, which has no run-time form here",
            got="use_relative_action", remedy="use a policy of absolute actions, or of lerobot's relative ones",
        )  # fmt: skip
    ends = ("q01", "q99") if step.config.get("use_percentiles") else ("min", "max")
    raw = (step.config.get("raw_stats") or {}).get("action", {})
    groups = (step.config.get("modality_config") or {}).get("action", {}).get("modality_keys", [])
    low, high = ([v for group in groups for v in raw.get(group, {}).get(end, [])] for end in ends)
    if len(low) < dim or len(low) != len(high):
        raise explain(
            directory / POSTPROCESSOR_FILE, f"has no statistics for all {dim} action entries of its embodiment",
            got=f"{len(low)} in groups {groups}",
            remedy="save the processors with the statistics of the robot's data set",
        )  # fmt: skip
    return FeatureStatistics(min=tuple(low[:dim]), max=tuple(high[:dim]))


def _refuse_gripper(directory: Path, transform: object) -> None:
    if transform:
        raise explain(
            directory / POSTPROCESSOR_FILE, "turns the gripper's action into a sign, which has no run-time form here",
            got=transform, remedy="save the policy with action_decode_transform 'none' and do that on the robot",
        )  # fmt: skip


def _horizon(config: Any, model_horizon: int) -> int:
    """Return how many steps of the model's chunk lerobot hands out."""
    own = infer_groot_n1_7_action_horizon(config.base_model_path, config.embodiment_tag)
    return min(
        model_horizon, own or model_horizon, int(config.chunk_size), int(config.n_action_steps)
    )


def _execute(config: Any, horizon: int) -> int:
    own = infer_groot_n1_7_action_execution_horizon(config.base_model_path, config.embodiment_tag)
    return min(horizon, own or horizon)


def _sampler(model: GR00TN17Config) -> EulerSampler:
    """Return GR00T's schedule in the runtime's direction: from noise at 1 to actions at 0."""
    steps = int(model.num_inference_timesteps)
    return EulerSampler(
        stage="denoise", state="x", time="timestep", velocity="velocity",
        timesteps=tuple(1.0 - index / steps for index in range(steps)), step=-1.0 / steps,
        noise_shape=(1, int(model.action_horizon), int(model.max_action_dim)),
    )  # fmt: skip
