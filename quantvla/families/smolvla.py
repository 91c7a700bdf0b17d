"""SmolVLA (arXiv 2506.01844): SigLIP tower, Llama prefix, flow-matching expert with interleaved cross-attention."""

from __future__ import annotations

import re
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import NormalizationMode
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy, make_att_2d_masks
from torch import Tensor, nn
from transformers import AutoTokenizer, DynamicCache

from quantvla.families.base import Family, Interface, LoadedPolicy, Site, Stage
from quantvla.families.lerobot_checkpoint import (
    POSTPROCESSOR_FILE,
    PREPROCESSOR_FILE,
    find_step,
    load_weights_,
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
    TensorSpec,
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


# --------------------------------------------------------------------------------------- loading
def resolve_vlm(directory: Path, name: str) -> str:
    """Return where the VLM's configuration and tokenizer are: inside the checkpoint, or the hub name.

    A relative ``vlm_model_name`` is looked up in the checkpoint directory first, so that a
    checkpoint that carries its VLM can be moved.
    """
    local = directory / name
    if (local / "config.json").is_file():
        return str(local.resolve())
    return name


def read_config(directory: Path) -> SmolVLAConfig:
    """Return the checkpoint's configuration, for the CPU, with its VLM found."""
    config: SmolVLAConfig = PreTrainedConfig.from_pretrained(directory)
    config.device = "cpu"
    config.load_vlm_weights = False
    config.compile_model = False
    config.vlm_model_name = resolve_vlm(directory, config.vlm_model_name)
    if config.adapt_to_pi_aloha:
        raise explain(
            directory / "config.json",
            "adapt_to_pi_aloha has no run-time form here",
            got=True,
            remedy="retrain with adapt_to_pi_aloha=false",
        )
    if not config.image_features:
        raise explain(
            directory / "config.json", "names no camera", remedy="use a policy with image inputs"
        )
    return config


def build_policy(
    directory: Path, config: SmolVLAConfig, absent: frozenset[str] = frozenset()
) -> SmolVLAPolicy:
    """Return lerobot's policy object with the checkpoint's weights, float32, for inference."""
    try:
        with redirect_stdout(sys.stderr):  # lerobot prints while it builds
            policy = SmolVLAPolicy(config)
    except OSError as error:
        raise explain(
            directory / "config.json",
            "its VLM configuration and tokenizer are not on this machine",
            got=config.vlm_model_name,
            remedy="copy that model's config, tokenizer and processor files into the checkpoint as "
            "`vlm/` and set vlm_model_name to 'vlm'",
        ) from error
    load_weights_(policy, directory, absent)
    return policy.float().eval()


def load(directory: Path, absent: frozenset[str] = frozenset()) -> LoadedPolicy:
    """Load a SmolVLA checkpoint directory; parameters named in ``absent`` may be missing from it."""
    config = read_config(directory)
    policy = build_policy(directory, config, absent)
    return LoadedPolicy(
        directory=directory,
        family=FAMILY.policy_type,
        policy=policy,
        sites=_sites(policy),
        stages=_stages(policy, config),
        interface=_interface(directory, config),
    )


# ----------------------------------------------------------------------------------------- sites
@dataclass(frozen=True)
class _SitePattern:
    pattern: str
    stage: str
    part: str
    role: str


_BACKBONE = r"model\.vlm_with_expert\.vlm\.model\."
_EXPERT = r"model\.vlm_with_expert\.lm_expert\.layers\.(?P<layer>\d+)\."
_VISION = _BACKBONE + r"vision_model\.encoder\.layers\.(?P<layer>\d+)\."
_LLM = _BACKBONE + r"text_model\.layers\.(?P<layer>\d+)\."
_ATTENTION = r"self_attn\.(?P<kind>q_proj|k_proj|v_proj|o_proj|out_proj)"
_MLP = r"mlp\.(?P<kind>gate_proj|up_proj|down_proj|fc1|fc2)"
_PATTERNS = (
    _SitePattern(_VISION + _ATTENTION, "vision", "vision", "attention"),
    _SitePattern(_VISION + _MLP, "vision", "vision", "mlp"),
    _SitePattern(
        _BACKBONE + r"connector\.modality_projection\.(?P<kind>proj)",
        "vision",
        "connector",
        "projection",
    ),
    _SitePattern(_LLM + _ATTENTION, "prefix", "llm", "attention"),
    _SitePattern(_LLM + _MLP, "prefix", "llm", "mlp"),
    _SitePattern(_EXPERT + _ATTENTION, "denoise", "expert", "attention"),
    _SitePattern(_EXPERT + _MLP, "denoise", "expert", "mlp"),
    _SitePattern(r"model\.(?P<kind>state_proj)", "prefix", "encoder", "projection"),
    _SitePattern(
        r"model\.(?P<kind>action_in_proj|action_time_mlp_in|action_time_mlp_out)",
        "denoise",
        "encoder",
        "projection",
    ),
    _SitePattern(r"model\.(?P<kind>action_out_proj)", "denoise", "decoder", "projection"),
    _SitePattern(r"model\.vlm_with_expert\.vlm\.(?P<kind>lm_head)", "prefix", "llm", "head"),
)
_PRODUCERS = {
    "q_proj": "{norm1}", "k_proj": "{norm1}", "v_proj": "{norm1}",
    "gate_proj": "{norm2}", "up_proj": "{norm2}", "fc1": "{norm2}",
    "o_proj": "{block}self_attn.v_proj", "out_proj": "{block}self_attn.v_proj",
    "down_proj": "{block}mlp.up_proj", "fc2": "{block}mlp.fc1",
}  # fmt: skip
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def _sites(policy: SmolVLAPolicy) -> tuple[Site, ...]:
    linears = {n: m for n, m in policy.named_modules() if isinstance(m, nn.Linear)}
    return tuple(_site(policy, name, linear) for name, linear in linears.items())


def _site(policy: SmolVLAPolicy, name: str, linear: nn.Linear) -> Site:
    for entry in _PATTERNS:
        if match := re.fullmatch(entry.pattern, name):
            break
    else:
        raise explain(
            name, "a linear this family does not know", remedy="add it to families/smolvla.py"
        )
    groups = match.groupdict()
    kind, layer = groups["kind"], int(groups["layer"]) if "layer" in groups else None
    cross = entry.part == "expert" and _is_cross_attention(policy, layer)
    return Site(
        name=name, stage=entry.stage, part=entry.part, role=entry.role, kind=kind, layer=layer,
        out_features=linear.out_features, in_features=linear.in_features,
        bias=linear.bias is not None,
        producer=_producer(name, entry.part, kind, layer, cross),
        siblings=_sibling_names(name, kind, cross),
        unused=_unused(policy, entry.part, kind, layer),
    )  # fmt: skip


def _is_cross_attention(policy: SmolVLAPolicy, layer: int | None) -> bool:
    model = policy.model.vlm_with_expert
    every = model.self_attn_every_n_layers
    return "cross" in model.attention_mode and not (
        every > 0 and layer is not None and layer % every == 0
    )


def _producer(name: str, part: str, kind: str, layer: int | None, cross: bool) -> str | None:
    if layer is None or kind not in _PRODUCERS:
        return None
    if cross and kind in ("k_proj", "v_proj"):  # reads the language model's cached keys or values
        return f"model.vlm_with_expert.vlm.model.text_model.layers.{layer}.self_attn.{kind}"
    block = name[: name.index(f".{layer}.") + len(f".{layer}.")]
    first, second = (
        ("layer_norm1", "layer_norm2")
        if part == "vision"
        else ("input_layernorm", "post_attention_layernorm")
    )
    return _PRODUCERS[kind].format(norm1=block + first, norm2=block + second, block=block)


def _sibling_names(name: str, kind: str, cross: bool) -> tuple[str, ...]:
    stem = name.removesuffix(kind)
    for group in _SIBLINGS:
        if kind in group and not (cross and group[0] == "q_proj"):
            return tuple(stem + other for other in group if other != kind)
    return ()


def _unused(policy: SmolVLAPolicy, part: str, kind: str, layer: int | None) -> str:
    if kind == "lm_head":
        return "token logits are never read: the expert takes keys and values"
    last = policy.model.vlm_with_expert.num_vlm_layers - 1
    if part == "llm" and layer == last and kind not in ("k_proj", "v_proj"):
        return "of the last layer the expert takes only keys and values"
    return ""


# ---------------------------------------------------------------------------------------- stages
class _Vision(nn.Module):
    """images (cameras, 3, height, width) in [-1, 1] -> image_features (cameras, tokens, hidden)."""

    def __init__(self, policy: SmolVLAPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.policy.model.vlm_with_expert.embed_image(images)
        return features


class _Prefix(nn.Module):
    """Image features, tokens (1, length) and state (1, padded) -> keys, values (layers, 1, heads, prefix, head_dim), prefix_mask (1, prefix)."""

    def __init__(self, policy: SmolVLAPolicy, empty_cameras: int) -> None:
        super().__init__()
        self.policy = policy
        self.empty_cameras = empty_cameras

    def forward(
        self, image_features: Tensor, tokens: Tensor, token_mask: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        model = self.policy.model
        features = [image_features[i : i + 1] for i in range(image_features.shape[0])]
        masks = [torch.ones(1, dtype=torch.bool) for _ in features]
        for _ in range(self.empty_cameras):  # masked, so what stands there does not matter
            features.append(torch.zeros_like(features[0]))
            masks.append(torch.zeros(1, dtype=torch.bool))
        # lerobot lays out the prefix; the features are already there, so embedding one is the identity.
        with mock.patch.object(model.vlm_with_expert, "embed_image", lambda image: image):
            embeddings, pad, attention = model.embed_prefix(
                features, masks, tokens, token_mask, state=state
            )
        _, cache = model.vlm_with_expert.forward(
            attention_mask=make_att_2d_masks(pad, attention),
            position_ids=torch.cumsum(pad, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[embeddings, None],
            use_cache=True,
        )
        keys = torch.stack([layer.keys for layer in cache.layers])
        values = torch.stack([layer.values for layer in cache.layers])
        return keys, values, pad


class _Denoise(nn.Module):
    """One call of the velocity field: x (1, horizon, padded action), timestep (1,) -> velocity like x."""

    def __init__(self, policy: SmolVLAPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(
        self, keys: Tensor, values: Tensor, prefix_mask: Tensor, x: Tensor, timestep: Tensor
    ) -> Tensor:
        cache = DynamicCache()
        for layer in range(keys.shape[0]):
            cache.update(keys[layer], values[layer], layer)
        velocity: Tensor = self.policy.model.denoise_step(
            prefix_pad_masks=prefix_mask, past_key_values=cache, x_t=x, timestep=timestep
        )
        return velocity


def _stages(policy: SmolVLAPolicy, config: SmolVLAConfig) -> tuple[Stage, ...]:
    vlm: Any = policy.model.vlm_with_expert.config
    text, vision = vlm.text_config, vlm.vision_config
    cameras = len(config.image_features) - config.empty_cameras
    height, width = _image_size(config)
    patches = (height // vision.patch_size) * (width // vision.patch_size)
    per_camera = patches // vlm.scale_factor**2
    markers = 3 if config.add_image_special_tokens else 0
    length = max(
        (cameras + config.empty_cameras) * (per_camera + markers) + config.tokenizer_max_length + 1,
        config.prefix_length,
    )
    layers = policy.model.vlm_with_expert.num_vlm_layers
    cache = (layers, 1, text.num_key_value_heads, length, text.head_dim)
    x = (1, config.chunk_size, config.max_action_dim)

    def spec(name: str, *shape: int, dtype: Any = "float32") -> TensorSpec:
        return TensorSpec(name=name, dtype=dtype, shape=shape)

    images = spec("images", cameras, 3, height, width)
    features = spec("image_features", cameras, per_camera, text.hidden_size)
    tokens = spec("tokens", 1, config.tokenizer_max_length, dtype="int64")
    token_mask = spec("token_mask", 1, config.tokenizer_max_length, dtype="bool")
    state = spec("state", 1, config.max_state_dim)
    context = (
        spec("keys", *cache),
        spec("values", *cache),
        spec("prefix_mask", 1, length, dtype="bool"),
    )
    return (
        Stage("vision", _Vision(policy), (images,), (features,)),
        Stage("prefix", _Prefix(policy, config.empty_cameras), (features, tokens, token_mask, state), context),
        Stage(
            "denoise", _Denoise(policy), (*context, spec("x", *x), spec("timestep", 1)),
            (spec("velocity", *x),), repeat=config.num_steps,
        ),
    )  # fmt: skip


# ------------------------------------------------------------------------------------- interface
def _image_size(config: SmolVLAConfig) -> tuple[int, int]:
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


def _interface(directory: Path, config: SmolVLAConfig) -> Interface:
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
    resize = _image_size(config) if config.resize_imgs_with_padding is not None else None
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


FAMILY = Family(policy_type="smolvla", load=load)
