"""GR00T N1.7 (NVIDIA Isaac GR00T): Qwen3-VL reads images and text, a diffusion transformer with AdaLN denoises.

Blocks of the action head attend in turn to the text, to themselves, to the images, to themselves.
The time sets scale and shift of the norm before every attention and of the last one. Encoders and
decoder have weights for many embodiments, of which a compiled policy has one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.groot import groot_n1_7
from lerobot.policies.groot.modeling_groot import GrootPolicy
from torch import Tensor, nn

from quantvla.families.base import Family, LoadedPolicy, Site, Stage, tensor_spec
from quantvla.families.blocks import (
    CENTRED,
    SitePattern,
    find_mlps,
    find_sites,
    norm_readers,
    residual_stream,
    tower,
)
from quantvla.families.groot import interface as outside
from quantvla.families.lerobot_checkpoint import empty_parameters, load_weights_, weight_shapes
from quantvla.families.qwen3_vl import Language, Layout, Vision, tap_language
from quantvla.runtime.errors import explain
from quantvla.runtime.manifest import EulerSampler
from quantvla.structure import (
    Attention,
    AttentionCallback,
    Modulation,
    Norm,
    Structure,
    ValueHeads,
    ValueReader,
)

_BACKBONE = "_groot_model.backbone.model."
_VLM = _BACKBONE + "model"
_VISION, _LLM = _VLM + ".visual", _VLM + ".language_model"
_EMBEDDING, _TOKEN_HEAD = _LLM + ".embed_tokens", _BACKBONE + "lm_head"
_HEAD = "_groot_model.action_head"
_DIT, _MIXER = _HEAD + ".model", _HEAD + ".vl_self_attention"
_MODULATED = "its norms subtract the mean over channels, and scale and shift depend on the time, channel by channel"
_READ_BY_LAYER_NORM = (
    "the action head reads its end through a LayerNorm, which subtracts the mean over channels"
)


# --------------------------------------------------------------------------------------- loading
def load(directory: Path, absent: frozenset[str] = frozenset()) -> LoadedPolicy:
    """Load a GR00T N1.7 checkpoint directory; parameters named in ``absent`` may be missing from it."""
    config: Any = PreTrainedConfig.from_pretrained(directory)
    config.device, config.use_bf16 = "cpu", False
    base = outside.find_base(directory, config.base_model_path)
    config.base_model_path = str(base.directory)
    before, after = outside.read_processors(directory)
    processor = outside.find_processor(directory, before)
    policy = empty_policy(config, base.config)
    model: Any = policy._groot_model
    made = outside.make_interface(directory, config, model.config, before, after, processor)
    stored = _stored_names(weight_shapes(directory))
    absent |= {_TOKEN_HEAD + ".weight"}
    load_weights_(policy, directory, absent, stored_names=stored, in_place=False)
    policy.eval()
    _prepare_attention_(policy)
    sites = describe_sites(policy)
    return LoadedPolicy(
        directory=directory,
        family=FAMILY.policy_type,
        policy=policy,
        sites=sites,
        structure=make_structure(policy, sites),
        tap_attention=partial(tap_attention, policy),
        stages=_stages(policy, made),
        interface=made.interface,
        predict_chunk=_predict_chunk,
        carried={**base.carried, **processor.carried},
        processor_overrides={outside.ENCODE_STEP: {"model_name": processor.place}},
        stored_names=stored,
    )


def empty_policy(config: Any, base: groot_n1_7.GR00TN17Config) -> Any:
    """Return lerobot's policy object on this base configuration; its parameters have shapes but no memory."""

    def create(**options: Any) -> Any:
        for name in ("num_inference_timesteps", "rtc_ramp_rate"):
            if name in options:
                setattr(base, name, options[name])
        return groot_n1_7.GR00TN17(base, load_backbone_weights=False)

    with empty_parameters(), mock.patch.object(groot_n1_7.GR00TN17, "from_pretrained", create):
        policy = GrootPolicy(config)
    if not base.use_alternate_vl_dit:
        raise explain(
            "GR00T base configuration", "use_alternate_vl_dit is off, and no stage is written for that",
            remedy="use a GR00T N1.7 checkpoint",
        )  # fmt: skip
    return policy


def _stored_names(stored: Iterable[str]) -> dict[str, str]:
    """Return the name of the embedding's weights in the file, if that of the unused head on tokens they are tied to."""
    ours, other = f"{_EMBEDDING}.weight", f"{_TOKEN_HEAD}.weight"
    names = set(stored)
    return {ours: other} if other in names and ours not in names else {}


def _predict_chunk(policy: Any, batch: Mapping[str, Any], noise: Tensor) -> Tensor:
    """Return lerobot's chunk from ``noise``, which it draws itself in the middle of sampling."""
    with mock.patch.object(torch, "randn", lambda *_, **__: noise):
        chunk: Tensor = policy.predict_action_chunk(batch)
    return chunk


# ----------------------------------------------------------------------------------------- sites
_NORMS, _VISION_NORMS = ("norm1", "norm3"), ("norm1", "norm2")
_BLOCK = r"\.transformer_blocks\.(?P<layer>\d+)\."
_DIFFUSERS_ATTENTION = r"attn1\.(?P<kind>to_q|to_k|to_v|to_out\.0)"
_DIFFUSERS_MLP = r"ff\.(?P<kind>net\.0\.proj|net\.2)"
_PATTERNS = (
    SitePattern(_VISION + r"\.blocks\.(?P<layer>\d+)\.attn\.(?P<kind>qkv|proj)", "vision", "vision", "attention", _VISION_NORMS),
    SitePattern(_VISION + r"\.blocks\.(?P<layer>\d+)\.mlp\.(?P<kind>linear_fc[12])", "vision", "vision", "mlp", _VISION_NORMS),
    SitePattern(_VISION + r"\.(deepstack_)?merger(_list\.\d+)?\.(?P<kind>linear_fc[12])", "vision", "connector", "projection"),
    *tower(_LLM, "prefix", "llm"),
    SitePattern(_MIXER + _BLOCK + _DIFFUSERS_ATTENTION, "prefix", "connector", "attention", _NORMS),
    SitePattern(_MIXER + _BLOCK + _DIFFUSERS_MLP, "prefix", "connector", "mlp", _NORMS),
    SitePattern(_DIT + _BLOCK + _DIFFUSERS_ATTENTION, "denoise", "expert", "attention", _NORMS),
    SitePattern(_DIT + _BLOCK + _DIFFUSERS_MLP, "denoise", "expert", "mlp", _NORMS),
    SitePattern(_DIT + _BLOCK + r"norm1\.(?P<kind>linear)", "denoise", "encoder", "modulation"),
    SitePattern(_DIT + r"\.(?P<kind>proj_out_1)", "denoise", "encoder", "modulation"),
    SitePattern(_DIT + r"\.timestep_encoder\.timestep_embedder\.(?P<kind>linear_[12])", "denoise", "encoder", "modulation"),
    SitePattern(_DIT + r"\.(?P<kind>proj_out_2)", "denoise", "decoder", "projection"),
    SitePattern(_TOKEN_HEAD.replace(".", r"\.").replace("lm_head", "(?P<kind>lm_head)"), "prefix", "llm", "head"),
)  # fmt: skip


def describe_sites(policy: nn.Module) -> tuple[Site, ...]:
    """Return every linear of the policy."""
    return find_sites(policy, _PATTERNS, _adjust)


def _adjust(site: Site) -> Site:
    if site.kind == "lm_head":
        return replace(site, unused="token logits are never read: the action head takes features")
    if site.kind == "proj_out_2":
        return replace(site, producer=_DIT + ".norm_out")
    if site.part != "expert" or site.layer is None or site.layer % 2:
        return site
    if site.kind == "to_q":  # of the head's own tokens; keys and values are of the context
        return replace(site, siblings=())
    if site.kind in ("to_k", "to_v"):
        other = {"to_k": "to_v", "to_v": "to_k"}[site.kind]
        return replace(site, producer=None, siblings=(site.name.replace(site.kind, other),))
    return site


# ------------------------------------------------------------------------------------- structure
def make_structure(policy: Any, sites: Iterable[Site]) -> Structure:
    """Return the structure of a policy with these linears; what inference never reads is left out."""
    used = [site for site in sites if not site.unused]
    text = policy._groot_model.backbone.model.config.text_config
    norms = tuple(_norm(name, readers) for name, readers in norm_readers(used).items())
    stream = partial(residual_stream, sites=used, norms=norms, policy=policy)
    return Structure(
        norms=norms,
        attentions=tuple(_attentions(policy, used, text)),
        values=tuple(_values(policy, used, text)),
        mlps=tuple(find_mlps(used)),
        streams=(
            stream("language model", (_EMBEDDING,), part="llm", root=_LLM, obstacle=_READ_BY_LAYER_NORM),
            stream("action head", (), part="expert", root=_DIT, obstacle=_MODULATED),
            stream("vision tower", (), part="vision", root=_VISION, obstacle=CENTRED),
        ),
    )  # fmt: skip


def _norm(name: str, readers: tuple[str, ...]) -> Norm:
    if name.startswith(_LLM):
        return Norm(name, "rms", readers)
    if name == _DIT + ".norm_out":
        by = Modulation(_DIT + ".proj_out_1", pieces=2, scale=1, shift=0)
        return Norm(name, "layer", readers, offset=1.0, modulation=by)
    if name.startswith(_DIT) and name.endswith(".norm1"):
        by = Modulation(name + ".linear", pieces=2, scale=0, shift=1)
        return Norm(name, "layer", readers, offset=1.0, modulation=by)
    return Norm(name, "layer", readers)


def _attentions(policy: Any, sites: Iterable[Site], text: Any) -> Iterator[Attention]:
    for site in sites:
        if site.kind not in ("o_proj", "to_out.0"):
            continue
        assert site.layer is not None
        stem = site.name.removesuffix(site.kind)
        own = site.kind == "to_out.0"
        heads = policy.get_submodule(stem[:-1]).heads if own else text.num_attention_heads
        yield Attention(
            q=stem + ("to_q" if own else "q_proj"), o=site.name, part=site.part, layer=site.layer,
            heads=heads, head_dim=site.in_features // heads, q_norm=None if own else stem + "q_norm",
        )  # fmt: skip


def _values(policy: Any, sites: Iterable[Site], text: Any) -> Iterator[ValueHeads]:
    for site in sites:
        if site.kind not in ("v_proj", "to_v"):
            continue
        stem, own = site.name.removesuffix(site.kind), site.kind == "to_v"
        heads = policy.get_submodule(stem[:-1]).heads if own else text.num_key_value_heads
        repeat = 1 if own else text.num_attention_heads // heads
        reader = ValueReader(stem + ("to_out.0" if own else "o_proj"), repeat)
        yield ValueHeads(site.name, (site.name,), (reader,), heads, site.out_features // heads)


class _Attend:
    """How an attention of the action head computes: plainly, and shown to ``watch`` when there is one."""

    def __init__(self) -> None:
        self.watch: Any = None

    def __call__(
        self, module: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            layer(x).unflatten(-1, (module.heads, -1)).transpose(1, 2)
            for layer, x in (
                (module.to_q, hidden_states), (module.to_k, source), (module.to_v, source),
            )
        )  # fmt: skip
        scores = q @ k.transpose(-1, -2) * module.scale
        if attention_mask is not None:
            mask = attention_mask[:, None, None, :].expand(-1, 1, q.shape[2], -1)
            scores = torch.where(mask, scores, torch.finfo(torch.float32).min)
        if self.watch is not None:
            seen = attention_mask if attention_mask is not None else torch.ones(len(k), k.shape[2])
            self.watch(q, k, seen.bool()[:, None, :].expand(-1, q.shape[2], -1))
        out: Tensor = module.to_out[0]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return out


def _prepare_attention_(policy: Any) -> None:
    model = policy._groot_model
    model.backbone.model.config.text_config._attn_implementation = "eager"
    model.backbone.language_model.config._attn_implementation = "eager"
    for name in (_DIT, _MIXER):
        for block in policy.get_submodule(name).transformer_blocks:
            block.attn1.set_processor(_Attend())


@contextmanager
def tap_attention(policy: nn.Module, callback: AttentionCallback) -> Iterator[None]:
    """Show ``callback`` the queries, keys and mask of every attention outside the vision tower while the block runs."""
    attentions = [
        (f"{name}.to_q", module.processor)
        for name, module in policy.named_modules()
        if isinstance(getattr(module, "processor", None), _Attend)
    ]
    with ExitStack() as stack:
        stack.enter_context(tap_language(policy, callback))
        for query, processor in attentions:
            stack.enter_context(mock.patch.object(processor, "watch", partial(callback, query)))
        yield


# ---------------------------------------------------------------------------------------- stages
class _OneEmbodiment(nn.Module):
    """Linears with weights for every embodiment, of which one is chosen: (..., in) -> (..., out)."""

    weight: Tensor
    bias: Tensor

    def __init__(self, layer: Any, embodiment: int) -> None:
        super().__init__()
        self._of = (layer, embodiment)  # a tuple, so that the weights of all are not this module's
        with torch.no_grad():
            self.derive_()

    def derive_(self) -> None:
        """Take the weights from the policy again."""
        layer, embodiment = self._of
        self.weight, self.bias = layer.W[embodiment], layer.b[embodiment]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class _Prefix(Language):
    """Image features, tokens, token_mask (1, length), state (1, padded) -> what the action head reads.

    In torch several observations may stand for the 1, image features then as in `Language.read`.

    text_context (1, text tokens, hidden) with text_mask, image_context (1, image tokens, hidden), and
    state_features (1, 1, width).
    """

    def __init__(
        self, policy: Any, layout: Layout, prompt: tuple[int, ...], embodiment: int
    ) -> None:
        super().__init__(policy, _VLM, layout, prompt)
        encoder = policy._groot_model.action_head.state_encoder
        self.first, self.second = (
            _OneEmbodiment(layer, embodiment) for layer in (encoder.layer1, encoder.layer2)
        )

    def forward(
        self, image_features: Tensor, tokens: Tensor, token_mask: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        policy: Any = self.policy
        head = policy._groot_model.action_head
        hidden = head.vlln(self.read(image_features, tokens, token_mask))
        for block in getattr(head.vl_self_attention, "transformer_blocks", ()):
            hidden = block(hidden, attention_mask=token_mask)  # lerobot has no padding to mask
        texts = [slice(*stretch) for stretch in self.layout.texts]
        images = [slice(*stretch) for stretch in self.layout.images]
        return (
            torch.cat([hidden[:, own] for own in texts], dim=1),
            torch.cat([token_mask[:, own] for own in texts], dim=1),
            torch.cat([hidden[:, own] for own in images], dim=1),
            self.second(nn.functional.relu(self.first(state)))[:, None],
        )


class _Denoise(nn.Module):
    """One call of the velocity field: contexts, x (batch, horizon, padded action), timestep (batch,) -> velocity like x.

    Here as everywhere in the runtime the time runs from 1 (noise) to 0 and the velocity points to
    the noise; GR00T's own run the other way.
    """

    def __init__(self, policy: Any, embodiment: int) -> None:
        super().__init__()
        self.policy = policy
        encoder, decoder = self.head.action_encoder, self.head.action_decoder
        self.encode, self.mix, self.out, self.decode, self.decoded = (
            _OneEmbodiment(layer, embodiment)
            for layer in (encoder.W1, encoder.W2, encoder.W3, decoder.layer1, decoder.layer2)
        )

    @property
    def head(self) -> Any:
        """The action head, below ``policy``, where its linears have the names that sites have."""
        return self.policy._groot_model.action_head

    def forward(
        self, text_context: Tensor, text_mask: Tensor, image_context: Tensor, state_features: Tensor,
        x: Tensor, timestep: Tensor,
    ) -> Tensor:  # fmt: skip
        head = self.head
        dit, buckets = head.model, head.num_timestep_buckets
        time = torch.floor((1 - timestep) * buckets + 0.001)  # lerobot's are whole numbers
        hidden = torch.cat((state_features, self._actions(x, time)), dim=1)
        embedded = dit.timestep_encoder(time)
        for index, block in enumerate(dit.transformer_blocks):
            context, mask = image_context, None
            if index % (2 * dit.attend_text_every_n_blocks) == 0:
                context, mask = text_context, text_mask
            if index % 2:
                hidden = block(hidden, temb=embedded)
            else:
                hidden = block(
                    hidden, encoder_hidden_states=context, encoder_attention_mask=mask, temb=embedded
                )  # fmt: skip
        shift, scale = dit.proj_out_1(nn.functional.silu(embedded)).chunk(2, dim=1)
        hidden = dit.proj_out_2(dit.norm_out(hidden) * (1 + scale[:, None]) + shift[:, None])
        velocity: Tensor = self.decoded(nn.functional.relu(self.decode(hidden[:, -x.shape[1] :])))
        return -velocity

    def _actions(self, x: Tensor, time: Tensor) -> Tensor:
        """Return the tokens of noisy actions; what the time adds to them is apart, so that it can be a table."""
        actions = self.encode(x)
        width = actions.shape[-1]
        angles = self.head.action_encoder.pos_encoding(time[:, None])
        of_time = angles @ self.mix.weight[width:] + self.mix.bias
        tokens: Tensor = self.out(nn.functional.silu(actions @ self.mix.weight[:width] + of_time))
        if self.head.config.add_pos_embed:
            tokens = tokens + self.head.position_embedding.weight[: x.shape[1]]
        return tokens


def _stages(policy: Any, made: outside.Outside) -> tuple[Stage, ...]:
    layout, interface, model = made.layout, made.interface, policy._groot_model
    config = model.config
    vision = model.backbone.visual.config
    cameras = len(interface.cameras)
    height, width = (side * vision.patch_size for side in layout.grid)
    image_tokens = layout.images[0][1] - layout.images[0][0]
    levels, hidden = len(vision.deepstack_visual_indexes), vision.out_hidden_size
    sampler: EulerSampler = interface.sampler
    images = tensor_spec("images", cameras, 3, height, width)
    features = tensor_spec("image_features", 1 + levels, cameras, image_tokens, hidden)
    tokens = tensor_spec("tokens", 1, layout.tokens, dtype="int64")
    mask = tensor_spec("token_mask", 1, layout.tokens, dtype="bool")
    state = tensor_spec("state", 1, config.max_state_dim)
    texts = layout.tokens - cameras * image_tokens
    context = (
        tensor_spec("text_context", 1, texts, hidden),
        tensor_spec("text_mask", 1, texts, dtype="bool"),
        tensor_spec("image_context", 1, cameras * image_tokens, hidden),
        tensor_spec("state_features", 1, 1, config.input_embedding_dim),
    )
    x, time = tensor_spec("x", *sampler.noise_shape), tensor_spec("timestep", 1)
    prefix = _Prefix(policy, layout, made.prompt, made.embodiment)
    return (
        Stage("vision", Vision(policy, _VISION, layout.grid), (images,), (features,)),
        Stage("prefix", prefix, (features, tokens, mask, state), context),
        Stage(
            "denoise", _Denoise(policy, made.embodiment), (*context, x, time),
            (tensor_spec("velocity", *sampler.noise_shape),), repeat=len(sampler.timesteps),
            batch_axes=(0,) * (len(context) + 2),
        ),
    )  # fmt: skip


FAMILY = Family(policy_type="groot", load=load)
