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

from quantvla.families.base import Family, LoadedPolicy, Site
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
from quantvla.families.groot.stages import BACKBONE, VISION, VLM, make_stages
from quantvla.families.lerobot_checkpoint import empty_parameters, load_weights_, weight_shapes
from quantvla.families.qwen3_vl import tap_language
from quantvla.runtime.errors import explain
from quantvla.structure import (
    Attention,
    AttentionCallback,
    Modulation,
    Norm,
    Structure,
    ValueHeads,
    ValueReader,
)

_LLM = VLM + ".language_model"
_EMBEDDING, _TOKEN_HEAD = _LLM + ".embed_tokens", BACKBONE + "lm_head"
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
        stages=make_stages(policy, made),
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
    SitePattern(VISION + r"\.blocks\.(?P<layer>\d+)\.attn\.(?P<kind>qkv|proj)", "vision", "vision", "attention", _VISION_NORMS),
    SitePattern(VISION + r"\.blocks\.(?P<layer>\d+)\.mlp\.(?P<kind>linear_fc[12])", "vision", "vision", "mlp", _VISION_NORMS),
    SitePattern(VISION + r"\.(deepstack_)?merger(_list\.\d+)?\.(?P<kind>linear_fc[12])", "vision", "connector", "projection"),
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
            stream("vision tower", (), part="vision", root=VISION, obstacle=CENTRED),
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


FAMILY = Family(policy_type="groot", load=load)
