"""SmolVLA (arXiv 2506.01844): SigLIP tower, Llama prefix, flow-matching expert with interleaved cross-attention."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy, make_att_2d_masks
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, AutoTokenizer

from quantvla.families import lerobot_interface as shared
from quantvla.families import prefix_cache
from quantvla.families.base import Family, Interface, LoadedPolicy, Site, Stage
from quantvla.families.blocks import (
    CENTRED,
    SIGLIP_NORMS,
    SitePattern,
    find_mlps,
    find_sites,
    norm_readers,
    residual_stream,
    tower,
)
from quantvla.families.lerobot_checkpoint import (
    POSTPROCESSOR_FILE,
    PREPROCESSOR_FILE,
    find_step,
    load_weights_,
    statistics,
)
from quantvla.runtime.errors import explain
from quantvla.runtime.processing_steps import Images, Tokenize
from quantvla.structure import (
    AttentionCallback,
    Norm,
    Structure,
    ValueHeads,
    ValueReader,
)

# --------------------------------------------------------------------------------------- loading
VLM_DIRECTORY = "vlm"


def resolve_vlm(directory: Path, name: str) -> str:
    """Return where the VLM's configuration and tokenizer are: inside the checkpoint, or the hub name.

    A relative ``vlm_model_name`` is looked up in the checkpoint directory first, then ``vlm/``, so
    that a checkpoint that carries its VLM can be moved.
    """
    for local in (directory / name, directory / VLM_DIRECTORY):
        if (local / "config.json").is_file():
            return str(local.resolve())
    return name


def vlm_files(directory: Path, name: str) -> dict[str, bytes]:
    """Return the VLM's configuration, tokenizer and processor by path in a checkpoint; none if they are inside."""
    if Path(name).is_relative_to(directory.resolve()):
        return {}
    with TemporaryDirectory() as temporary:
        for part in (AutoConfig, AutoProcessor):
            part.from_pretrained(name).save_pretrained(temporary)
        files = (path for path in sorted(Path(temporary).rglob("*")) if path.is_file())
        return {
            f"{VLM_DIRECTORY}/{path.relative_to(temporary).as_posix()}": path.read_bytes()
            for path in files
        }


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
    interface = make_interface(directory, config)
    return LoadedPolicy(
        directory=directory,
        family=FAMILY.policy_type,
        policy=policy,
        sites=sites,
        structure=make_structure(policy, sites),
        tap_attention=lambda callback: tap_attention(policy, callback),
        stages=_stages(policy, config, interface),
        interface=interface,
        carried=vlm_files(directory, config.vlm_model_name),
        processor_overrides={"tokenizer_processor": {"tokenizer_name": config.vlm_model_name}},
    )


# ----------------------------------------------------------------------------------------- sites
_BACKBONE = "model.vlm_with_expert.vlm.model."
_LLM = _BACKBONE + "text_model"
_EXPERT = "model.vlm_with_expert.lm_expert"
_VISION = _BACKBONE + "vision_model"
_PATTERNS = (
    *tower(_VISION + ".encoder", "vision", "vision", SIGLIP_NORMS),
    *tower(_LLM, "prefix", "llm"),
    *tower(_EXPERT, "denoise", "expert"),
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
    last = policy.model.vlm_with_expert.num_vlm_layers - 1
    site = replace(site, unused=prefix_cache.why_unused(site, last))
    if site.kind == "action_out_proj":
        return replace(site, producer=_EXPERT + ".norm")
    cross = site.part == "expert" and _is_cross_attention(policy, site.layer)
    if cross and site.kind in ("q_proj", "k_proj", "v_proj"):
        producer = site.producer
        if site.kind != "q_proj":  # reads the language model's cached keys or values
            producer = f"{_LLM}.layers.{site.layer}.self_attn.{site.kind}"
        return replace(site, producer=producer, siblings=())
    return site


def _is_cross_attention(policy: SmolVLAPolicy, layer: int | None) -> bool:
    model = policy.model.vlm_with_expert
    every = model.self_attn_every_n_layers
    return "cross" in model.attention_mode and not (
        every > 0 and layer is not None and layer % every == 0
    )


# ------------------------------------------------------------------------------------- structure
_EMBEDDERS = (
    _LLM + ".embed_tokens",
    "model.vlm_with_expert.vlm.model.connector.modality_projection.proj",
    "model.state_proj",
)


def make_structure(policy: SmolVLAPolicy, sites: Sequence[Site]) -> Structure:
    """Return the structure of a policy with these linears; what inference never reads is left out."""
    used = [site for site in sites if not site.unused]
    model = policy.model.vlm_with_expert
    values = _Values({site.name: site for site in used}, model)
    heads = model.config.text_config.num_attention_heads
    vision_heads = model.config.vision_config.num_attention_heads
    norms = tuple(
        Norm(name, "layer" if name.startswith(_VISION) else "rms", readers)
        for name, readers in norm_readers(used).items()
    )
    stream = partial(residual_stream, sites=used, norms=norms, policy=policy)
    return Structure(
        norms=norms,
        attentions=tuple(prefix_cache.find_attentions(used, heads, vision_heads)),
        values=(*prefix_cache.vision_values(used, vision_heads), *values.of_both_towers()),
        mlps=tuple(find_mlps(used)),
        streams=(
            stream("language model", _EMBEDDERS, part="llm", root=_LLM),
            stream("action head", ("model.action_time_mlp_out",), part="expert", root=_EXPERT),
            stream("vision tower", (), part="vision", root=_VISION, obstacle=CENTRED),
        ),
    )


class _Values:
    """Value heads layer by layer; the action head reads the language model's values of the same layer."""

    def __init__(self, sites: dict[str, Site], model: Any) -> None:
        self._sites, self._model = sites, model
        text = model.config.text_config
        self._heads, self._value_heads = text.num_attention_heads, text.num_key_value_heads
        self._head_dim = text.head_dim

    def of_both_towers(self) -> Iterator[ValueHeads]:
        if self._model.num_expert_layers == self._model.num_vlm_layers:
            for layer in range(self._model.num_vlm_layers):
                yield from self._values_of(layer)

    def _values_of(self, layer: int) -> Iterator[ValueHeads]:
        value, out, own, own_out = (
            f"{root}.layers.{layer}.self_attn.{kind}"
            for root in (_LLM, _EXPERT)
            for kind in ("v_proj", "o_proj")
        )
        crossed = (
            self._sites[own].producer == value
        )  # reads the language model's values as its input
        readers = [name for name in (out, *(() if crossed else (own_out,))) if name in self._sites]
        yield self._heads_of(
            value,
            (value,) if crossed else (value, own),
            [self._averaged(name) for name in readers] + [ValueReader(own, 1)] * crossed,
        )
        if crossed:
            yield self._heads_of(own, (own,), [self._averaged(own_out)])

    def _averaged(self, site: str) -> ValueReader:
        return ValueReader(site, self._heads // self._value_heads)

    def _heads_of(
        self, name: str, writers: tuple[str, ...], readers: Sequence[ValueReader]
    ) -> ValueHeads:
        return ValueHeads(name, writers, tuple(readers), self._value_heads, self._head_dim)


@contextmanager
def tap_attention(policy: SmolVLAPolicy, callback: AttentionCallback) -> Iterator[None]:
    """Show ``callback`` the queries, keys and mask of every attention outside the vision tower while the block runs."""
    model = policy.model.vlm_with_expert
    original = model.eager_attention_forward
    asked: list[str] = []

    def attend(
        mask: Tensor, batch: int, head_dim: int, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        heads = query.shape[2] // key.shape[2]
        keys = key.repeat_interleave(heads, dim=2).transpose(1, 2)
        callback(asked[-1], query.transpose(1, 2), keys, mask)
        result: Tensor = original(mask, batch, head_dim, query, key, value)
        return result

    def remember(name: str, *_: object) -> None:
        asked[:] = [name]

    handles = [
        module.register_forward_pre_hook(partial(remember, name))
        for name, module in policy.named_modules()
        if name.endswith(".q_proj") and not name.startswith(_VISION)
    ]
    try:
        with mock.patch.object(model, "eager_attention_forward", attend):
            yield
    finally:
        for handle in handles:
            handle.remove()


# ---------------------------------------------------------------------------------------- stages
def _stages(
    policy: SmolVLAPolicy, config: SmolVLAConfig, interface: Interface
) -> tuple[Stage, ...]:
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
    shapes = prefix_cache.Shapes(
        cameras=cameras, empty_cameras=config.empty_cameras, image=(height, width),
        image_tokens=per_camera, hidden=text.hidden_size, text=config.tokenizer_max_length,
        prefix=length, layers=policy.model.vlm_with_expert.num_vlm_layers,
        key_value_heads=text.num_key_value_heads, head_dim=text.head_dim,
    )  # fmt: skip
    return prefix_cache.make_stages(
        policy, "vlm_with_expert", make_att_2d_masks, shapes, interface.sampler,
        repeat=config.num_steps, prefix_state=config.max_state_dim,
    )  # fmt: skip


# ------------------------------------------------------------------------------------- interface
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


FAMILY = Family(policy_type="smolvla", load=load)
