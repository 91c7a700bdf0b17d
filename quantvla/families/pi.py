"""pi0 (arXiv 2410.24164) and pi0.5 (arXiv 2504.16054): SigLIP and Gemma read images and text, a Gemma expert denoises.

Both read the language model's keys and values in joint attention, layer by layer. In pi0 the state
is a token of the action head and the time enters its first MLP; in pi0.5 the state is text in the
prompt, and the time sets scale, shift and gate of every norm of the action head (adaRMS).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import msgspec
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d
from lerobot.policies.pi0 import modeling_pi0
from lerobot.policies.pi05 import modeling_pi05
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.models.gemma import modeling_gemma

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
    empty_parameters,
    find_step,
    load_weights_,
    statistics,
    weight_shapes,
)
from quantvla.runtime.errors import explain
from quantvla.runtime.processing_steps import Images, Prompt, StateText, Tokenize
from quantvla.structure import (
    AttentionCallback,
    Modulation,
    Norm,
    Structure,
    ValueHeads,
    ValueReader,
)

_BOTH = "model.paligemma_with_expert."
_VLM = _BOTH + "paligemma.model."
_VISION = _VLM + "vision_tower.vision_model.encoder"
_LLM = _VLM + "language_model"
_EMBEDDING = _LLM + ".embed_tokens"
_EXPERT = _BOTH + "gemma_expert.model"
_PROJECTOR = _VLM + "multi_modal_projector.linear"
_MODULATED = (
    "scale and shift of its norms and the gates on what is added depend on the time, channel by "
    "channel, and no rotation commutes with them"
)


@dataclass(frozen=True)
class Kind:
    """One of the two: lerobot's module and class, and whether its norms are modulated by the time."""

    name: str
    module: ModuleType
    policy: Any
    adaptive: bool
    steps: frozenset[str]


_PI0 = Kind(
    "pi0", modeling_pi0, modeling_pi0.PI0Policy, False,
    frozenset({"pi0_new_line_processor", "relative_actions_processor", "absolute_actions_processor"}),
)  # fmt: skip
_PI05 = Kind(
    "pi05", modeling_pi05, modeling_pi05.PI05Policy, True,
    frozenset({"pi05_prepare_state_tokenizer_processor_step", "relative_actions_processor",
               "absolute_actions_processor"}),
)  # fmt: skip


# --------------------------------------------------------------------------------------- loading
WIDTHS_FILE = "widths.json"
_HEADS = 8  # lerobot writes this number into its attention


class Gemma(msgspec.Struct, frozen=True):
    """Widths of one Gemma: hidden, layers, MLP, key-value heads and the width of a head."""

    width: int
    depth: int
    mlp_dim: int
    num_kv_heads: int
    head_dim: int


class Widths(msgspec.Struct, frozen=True):
    """Widths of a pi policy that lerobot takes for granted.

    lerobot builds the released models' widths whatever the checkpoint; here they are those of the
    checkpoint's weights, so that a smaller policy of the same structure loads as well.
    """

    language: Gemma
    expert: Gemma
    vocabulary: int
    expert_vocabulary: int
    vision_width: int
    vision_mlp: int
    vision_depth: int


def read_widths(directory: Path) -> Widths:
    """Return the widths of a checkpoint: of its weights, or as noted where some of these are integers elsewhere.

    Raises `QuantVLAError` when the weights are not those of a pi policy.
    """
    noted = directory / WIDTHS_FILE
    try:
        if noted.is_file():
            return msgspec.json.decode(noted.read_bytes(), type=Widths)
        stored = weight_shapes(directory)
        names = parameter_names(stored)
        shapes = {name: stored[old] for name, old in names.items()}
        vision = _VISION + ".layers.0.mlp.fc1.weight"
        return Widths(
            language=_gemma(shapes, _LLM), expert=_gemma(shapes, _EXPERT),
            vocabulary=shapes[_EMBEDDING + ".weight"][0],
            expert_vocabulary=shapes[_BOTH + "gemma_expert.lm_head.weight"][0],
            vision_width=shapes[vision][1], vision_mlp=shapes[vision][0],
            vision_depth=_depth(shapes, _VISION),
        )  # fmt: skip
    except (KeyError, msgspec.ValidationError, msgspec.DecodeError) as error:
        raise explain(
            directory,
            f"its weights are not those of a pi policy ({error})",
            remedy="use the config.json and model.safetensors that were saved together",
        ) from error


def _gemma(shapes: dict[str, tuple[int, ...]], root: str) -> Gemma:
    first = f"{root}.layers.0."
    attended, width = shapes[first + "self_attn.q_proj.weight"]
    head_dim = attended // _HEADS
    return Gemma(
        width=width, depth=_depth(shapes, root), mlp_dim=shapes[first + "mlp.gate_proj.weight"][0],
        num_kv_heads=shapes[first + "self_attn.k_proj.weight"][0] // head_dim, head_dim=head_dim,
    )  # fmt: skip


def _depth(shapes: Iterable[str], root: str) -> int:
    stem = f"{root}.layers."
    return 1 + max(
        int(name.removeprefix(stem).split(".")[0]) for name in shapes if name.startswith(stem)
    )


def parameter_names(stored: Iterable[str]) -> dict[str, str]:
    """Return parameter -> name in the weights file, as lerobot reads files of openpi's names.

    Those have no leading ``model.``, may call pi0.5's time MLP ``action_time_mlp``, and may leave
    the embedding out, which then is the head on the tokens.
    """
    found = {name if name.startswith("model.") else f"model.{name}": name for name in stored}
    head = _BOTH + "paligemma.lm_head.weight"
    if _EMBEDDING + ".weight" not in found and head in found:
        found[_EMBEDDING + ".weight"] = found[head]
    return found


@contextmanager
def widths_in_place(kind: Kind, widths: Widths) -> Iterator[None]:
    """Have lerobot build a policy of these widths while the block runs."""
    module: Any = kind.module
    vlm, expert = module.PaliGemmaForConditionalGenerationWithPiGemma, module.PiGemmaForCausalLM

    def gemma(variant: str) -> Any:
        own = widths.language if variant == "gemma_2b" else widths.expert
        return module.GemmaConfig(num_heads=_HEADS, **msgspec.structs.asdict(own))

    def make_vlm(config: Any) -> Any:
        text, vision = config.text_config, config.vision_config
        text.vocab_size = widths.vocabulary
        vision.hidden_size, vision.intermediate_size = widths.vision_width, widths.vision_mlp
        vision.num_hidden_layers = widths.vision_depth
        vision.projection_dim = config.projection_dim = widths.language.width
        return vlm(config=config)

    def make_expert(config: Any) -> Any:
        config.vocab_size = widths.expert_vocabulary
        return expert(config=config)

    with mock.patch.multiple(
        module,
        get_gemma_config=gemma,
        PaliGemmaForConditionalGenerationWithPiGemma=make_vlm,
        PiGemmaForCausalLM=make_expert,
    ):
        yield


def empty_policy(kind: Kind, config: Any, widths: Widths) -> Any:
    """Return lerobot's policy object of these widths; its parameters have shapes but no memory."""
    with redirect_stdout(sys.stderr), empty_parameters(), widths_in_place(kind, widths):
        return kind.policy(config)


def load(kind: Kind, directory: Path, absent: frozenset[str] = frozenset()) -> LoadedPolicy:
    """Load a pi checkpoint directory; parameters named in ``absent`` may be missing from it."""
    config: Any = PreTrainedConfig.from_pretrained(directory)
    config.device, config.dtype, config.compile_model = "cpu", "float32", False
    before, after = shared.read_processors(directory, kind.steps)
    step = find_step(before, "tokenizer_processor", PREPROCESSOR_FILE)
    tokenizer = shared.find_tokenizer(directory, str(step.config.get("tokenizer_name")))
    widths = read_widths(directory)
    interface = _interface(kind, directory, config, before, after, tokenizer)
    stored = {
        name: old for name, old in parameter_names(weight_shapes(directory)).items() if name != old
    }
    policy = empty_policy(kind, config, widths)
    load_weights_(policy, directory, absent, stored_names=stored, in_place=False)
    towers = policy.model.paligemma_with_expert
    for model in (towers.paligemma.model.language_model, towers.gemma_expert.model):
        model.config._attn_implementation = "eager"  # as lerobot has it when it samples
    policy.eval()
    sites = describe_sites(policy, widths)
    return LoadedPolicy(
        directory=directory,
        family=kind.name,
        policy=policy,
        sites=sites,
        structure=_structure(kind, policy, sites, widths),
        tap_attention=lambda callback: tap_attention(policy, callback),
        stages=_stages(kind, policy, config, widths, interface),
        interface=interface,
        carried={
            WIDTHS_FILE: msgspec.json.encode(widths),
            **shared.tokenizer_files(tokenizer),
        },
        processor_overrides={"tokenizer_processor": {"tokenizer": tokenizer}},
        stored_names=stored,
    )


# ----------------------------------------------------------------------------------------- sites
_PATTERNS = (
    *tower(_VISION, "vision", "vision", SIGLIP_NORMS),
    *tower(_LLM, "prefix", "llm"),
    *tower(_EXPERT, "denoise", "expert"),
    SitePattern(r".*\.multi_modal_projector\.(?P<kind>linear)", "vision", "connector", "projection"),
    SitePattern(
        r"model\.(?P<kind>action_in_proj|state_proj|(action_)?time_mlp_(in|out))",
        "denoise", "encoder", "projection",
    ),
    SitePattern(r"model\.(?P<kind>action_out_proj)", "denoise", "decoder", "projection"),
    SitePattern(
        r".*\.gemma_expert\.model\.(layers\.(?P<layer>\d+)\.)?\w*norm\.(?P<kind>dense)",
        "denoise", "encoder", "modulation",
    ),
    SitePattern(r".*\.(?P<kind>lm_head)", "prefix", "llm", "head"),
)  # fmt: skip


def describe_sites(policy: nn.Module, widths: Widths) -> tuple[Site, ...]:
    """Return every linear of a pi policy of these widths."""
    return find_sites(policy, _PATTERNS, partial(_adjust, widths.language.depth))


def _adjust(depth: int, site: Site) -> Site:
    """Return the site with its final norm, and why it is unused where it is."""
    if site.kind == "action_out_proj":
        return replace(site, producer=_EXPERT + ".norm")
    return replace(site, unused=prefix_cache.why_unused(site, depth - 1))


# ------------------------------------------------------------------------------------- structure
def _structure(kind: Kind, policy: nn.Module, sites: Iterable[Site], widths: Widths) -> Structure:
    used = [site for site in sites if not site.unused]
    norms = tuple(_norm(kind, name, readers) for name, readers in norm_readers(used).items())
    stream = partial(residual_stream, sites=used, norms=norms, policy=policy)
    suffix = "model.action_in_proj" if kind.adaptive else "model.action_time_mlp_out"
    embedders = (suffix,) if kind.adaptive else (suffix, "model.state_proj")
    obstacle = _MODULATED if kind.adaptive else ""
    return Structure(
        norms=norms,
        attentions=tuple(prefix_cache.find_attentions(used, _HEADS, _VISION_HEADS)),
        values=(*_values(used, widths), *prefix_cache.vision_values(used, _VISION_HEADS)),
        mlps=tuple(find_mlps(used)),
        streams=(
            stream("language model", (_EMBEDDING, _PROJECTOR), part="llm", root=_LLM),
            stream("action head", embedders, part="expert", root=_EXPERT, obstacle=obstacle),
            stream("vision tower", (), part="vision", root=_VISION, obstacle=CENTRED),
        ),
    )


def _norm(kind: Kind, name: str, readers: tuple[str, ...]) -> Norm:
    if name.startswith(_VISION):
        return Norm(name, "layer", readers)
    modulation = None
    if kind.adaptive and name.startswith(_EXPERT):
        modulation = Modulation(name + ".dense", pieces=3, scale=0, shift=1)
    return Norm(name, "rms", readers, offset=1.0, modulation=modulation)


_VISION_HEADS = 16  # transformers' default, which lerobot does not change


def _values(sites: Iterable[Site], widths: Widths) -> Iterator[ValueHeads]:
    """Yield the value heads; the two Gemmas' values of one layer stand side by side in one attention."""
    used = {site.name for site in sites}
    gemma = widths.language
    for layer in range(gemma.depth):
        writers, readers = (
            tuple(f"{root}.layers.{layer}.self_attn.{kind}" for root in (_LLM, _EXPERT))
            for kind in ("v_proj", "o_proj")
        )
        repeat = _HEADS // gemma.num_kv_heads
        yield ValueHeads(
            writers[0], writers,
            tuple(ValueReader(name, repeat) for name in readers if name in used),
            gemma.num_kv_heads, gemma.head_dim,
        )  # fmt: skip


@contextmanager
def tap_attention(policy: nn.Module, callback: AttentionCallback) -> Iterator[None]:
    """Show ``callback`` the queries, keys and mask of every attention of both Gemmas while the block runs."""
    original = modeling_gemma.eager_attention_forward
    names = {
        id(module): f"{name}.q_proj"
        for name, module in policy.named_modules()
        if isinstance(module, modeling_gemma.GemmaAttention)
    }

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any
    ) -> Any:
        keys = modeling_gemma.repeat_kv(key, module.num_key_value_groups)
        callback(names[id(module)], query, keys, mask[:, 0] == 0)
        return original(module, query, key, value, mask, **options)

    with mock.patch.object(modeling_gemma, "eager_attention_forward", attend):
        yield


# ---------------------------------------------------------------------------------------- stages
def _attention_mask(pad: Tensor, attention: Tensor) -> Tensor:
    mask: Tensor = prepare_attention_masks_4d(make_att_2d_masks(pad, attention))
    return mask


def _stages(
    kind: Kind, policy: nn.Module, config: Any, widths: Widths, interface: Interface
) -> tuple[Stage, ...]:
    model: Any = policy.model
    vision = model.paligemma_with_expert.paligemma.model.vision_tower.config
    text = next(step for step in interface.preprocess if isinstance(step, Tokenize))
    cameras, gemma = len(interface.cameras), widths.language
    height, width = (int(side) for side in config.image_resolution)
    patches = (height // vision.patch_size) * (width // vision.patch_size)
    shapes = prefix_cache.Shapes(
        cameras=cameras, empty_cameras=config.empty_cameras, image=(height, width),
        image_tokens=patches, hidden=gemma.width, text=text.max_length,
        prefix=(cameras + config.empty_cameras) * patches + text.max_length,
        layers=gemma.depth, key_value_heads=gemma.num_kv_heads, head_dim=gemma.head_dim,
    )  # fmt: skip
    return prefix_cache.make_stages(
        policy, "paligemma_with_expert", _attention_mask, shapes, interface.sampler,
        repeat=config.num_inference_steps,
        denoise_state=None if kind.adaptive else config.max_state_dim,
    )  # fmt: skip


# ------------------------------------------------------------------------------------- interface
def _interface(
    kind: Kind, directory: Path, config: Any, before: shared.Steps, after: shared.Steps,
    tokenizer: PreTrainedTokenizerFast,
) -> Interface:  # fmt: skip
    normalizer = find_step(before, "normalizer_processor", PREPROCESSOR_FILE)
    unnormalizer = find_step(after, "unnormalizer_processor", POSTPROCESSOR_FILE)
    shared.refuse_normalized_images(directory, normalizer.config)
    state, dim = shared.features(directory, config)
    cameras = shared.cameras(directory, config, before)
    origin, absolute = shared.relative_actions(directory, before, after, state, dim)
    text = find_step(before, "tokenizer_processor", PREPROCESSOR_FILE).config
    images = Images(
        keys=tuple(camera.key for camera in cameras), output="images", pad="around",
        resize=(int(config.image_resolution[0]), int(config.image_resolution[1])),
        pad_value=0.0, scale=2.0, offset=-1.0,
    )  # fmt: skip
    normalize = shared.normalize_state(normalizer.config, "state", config.max_state_dim)
    tokenize = Tokenize(
        key=shared.TASK_KEY, file=shared.TOKENIZER_FILE, suffix="" if kind.adaptive else "\n",
        max_length=int(text.get("max_length", config.tokenizer_max_length)),
        pad_id=int(tokenizer.pad_token_id), tokens="tokens", mask="token_mask",
        prompt=_state_prompt(normalize.mode, normalize.eps) if kind.adaptive else Prompt(),
    )  # fmt: skip
    vector = () if kind.adaptive else (normalize,)
    return Interface(
        preprocess=(images, *vector, *origin, tokenize),
        postprocess=(shared.unnormalize_action(unnormalizer.config, dim), *absolute),
        statistics=shared.vector_statistics(statistics(normalizer) | statistics(unnormalizer)),
        cameras=cameras,
        state=state,
        task_key=shared.TASK_KEY,
        action=shared.action_spec(config, dim),
        sampler=shared.flow_sampler(config, config.num_inference_steps),
        files={shared.TOKENIZER_FILE: tokenizer.backend_tokenizer.to_str().encode()},
    )


def _state_prompt(mode: Any, eps: float) -> Prompt:
    """Return pi0.5's prompt: the sentence, then the normalized state in 256 bins."""
    return Prompt(
        template="Task: {task}, State: {state};\nAction: ", strip=True,
        replace=(("_", " "), ("\n", " ")),
        state=StateText(key=shared.STATE_KEY, mode=mode, eps=eps, bins=256),
    )  # fmt: skip


KINDS = {kind.name: kind for kind in (_PI0, _PI05)}
PI0, PI05 = (Family(policy_type=name, load=partial(load, kind)) for name, kind in KINDS.items())
