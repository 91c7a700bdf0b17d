"""SmolVLA (arXiv 2506.01844): SigLIP tower, Llama prefix, flow-matching expert with interleaved cross-attention."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy, make_att_2d_masks
from torch import Tensor, nn
from transformers import DynamicCache

from quantvla.families.base import Family, LoadedPolicy, Site, Stage
from quantvla.families.blocks import SIGLIP_NORMS, SitePattern, find_sites, tower
from quantvla.families.lerobot_checkpoint import load_weights_
from quantvla.families.smolvla_interface import image_size, make_interface
from quantvla.families.smolvla_structure import make_structure, tap_attention
from quantvla.runtime.errors import explain
from quantvla.runtime.manifest import TensorSpec


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
    sites = find_sites(policy, _PATTERNS, lambda site: _adjust(policy, site))
    return LoadedPolicy(
        directory=directory,
        family=FAMILY.policy_type,
        policy=policy,
        sites=sites,
        structure=make_structure(policy, sites),
        tap_attention=lambda callback: tap_attention(policy, callback),
        stages=_stages(policy, config),
        interface=make_interface(directory, config),
        processor_overrides={"tokenizer_processor": {"tokenizer_name": config.vlm_model_name}},
    )


# ----------------------------------------------------------------------------------------- sites
_BACKBONE = "model.vlm_with_expert.vlm.model."
_PATTERNS = (
    *tower(_BACKBONE + "vision_model.encoder", "vision", "vision", SIGLIP_NORMS),
    *tower(_BACKBONE + "text_model", "prefix", "llm"),
    *tower("model.vlm_with_expert.lm_expert", "denoise", "expert"),
    SitePattern(
        r".*\.connector\.modality_projection\.(?P<kind>proj)", "vision", "connector", "projection"
    ),
    SitePattern(r"model\.(?P<kind>state_proj)", "prefix", "encoder", "projection"),
    SitePattern(
        r"model\.(?P<kind>action_in_proj|action_time_mlp_in|action_time_mlp_out)",
        "denoise",
        "encoder",
        "projection",
    ),
    SitePattern(r"model\.(?P<kind>action_out_proj)", "denoise", "decoder", "projection"),
    SitePattern(r"model\.vlm_with_expert\.vlm\.(?P<kind>lm_head)", "prefix", "llm", "head"),
)


def _adjust(policy: SmolVLAPolicy, site: Site) -> Site:
    """Return the site with what SmolVLA does otherwise than other transformers."""
    site = replace(site, unused=_unused(policy, site.part, site.kind, site.layer))
    if site.kind == "action_out_proj":
        return replace(site, producer="model.vlm_with_expert.lm_expert.norm")
    cross = site.part == "expert" and _is_cross_attention(policy, site.layer)
    if cross and site.kind in ("q_proj", "k_proj", "v_proj"):
        producer = site.producer
        if site.kind != "q_proj":  # reads the language model's cached keys or values
            producer = f"{_BACKBONE}text_model.layers.{site.layer}.self_attn.{site.kind}"
        return replace(site, producer=producer, siblings=())
    return site


def _is_cross_attention(policy: SmolVLAPolicy, layer: int | None) -> bool:
    model = policy.model.vlm_with_expert
    every = model.self_attn_every_n_layers
    return "cross" in model.attention_mode and not (
        every > 0 and layer is not None and layer % every == 0
    )


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
    height, width = image_size(config)
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
        Stage("prefix", _Prefix(policy, config.empty_cameras), (features, tokens, token_mask, state), context, attended=True),
        Stage(
            "denoise", _Denoise(policy), (*context, spec("x", *x), spec("timestep", 1)),
            (spec("velocity", *x),), repeat=config.num_steps, batch_axes=(1, 1, 0, 0, 0),
        ),
    )  # fmt: skip


FAMILY = Family(policy_type="smolvla", load=load)
