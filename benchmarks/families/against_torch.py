"""Chunks of full-size engines beside lerobot's own policy in bfloat16, in turns in one process.

    python -m benchmarks.families.against_torch build/full_size/pi05 build/full_size/pi05-w4a8-fast/engine

lerobot's policy is its own class and call with its own choice of what is bfloat16: pi0 and pi0.5 keep the vision tower
and norms in float32 (``config.dtype = "bfloat16"``), GR00T's weights are all bfloat16, as its base model is published, under
the autocast of ``use_bf16``; attentions are PyTorch's fused ones where lerobot would use those. All arms see the same random
observation, take the same noise, and use the same number of threads; the first round is not counted. Adds to
``benchmarks/families/against_torch.json``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import msgspec
import numpy as np
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from transformers import PreTrainedTokenizerFast

from quantvla.families import load_policy
from quantvla.families.lerobot_interface import TOKENIZER_DIRECTORY
from quantvla.float_policy import FloatPolicy
from quantvla.runtime.files import write_atomic
from quantvla.runtime.machine import memory, physical_cores, processor
from quantvla.runtime.policy import Policy
from quantvla.versions import compiler_versions

RESULT = Path(__file__).parent / "against_torch.json"


class Arm(msgspec.Struct, frozen=True):
    """One way to run the policy: milliseconds of a chunk (median, least, most) and, medians, of an engine's stages."""

    chunk_ms: tuple[float, float, float]
    stages_ms: dict[str, float] = {}


class Comparison(msgspec.Struct, frozen=True):
    """All arms on one policy."""

    policy: str
    rounds: int
    threads: int
    processor: str
    versions: dict[str, str]
    arms: dict[str, Arm]
    ratios: dict[str, float]


def bfloat16_policy(checkpoint: Path) -> tuple[FloatPolicy, str]:
    """Return lerobot's policy in bfloat16, as lerobot makes it, and the family's name."""
    loaded = load_policy(checkpoint)
    policy: Any = loaded.policy
    if loaded.family == "groot":
        policy.config.use_bf16 = True
        model = policy._groot_model.to(torch.bfloat16)
        use_tokens(model.backbone.model.config, checkpoint / TOKENIZER_DIRECTORY)
        for config in (
            model.backbone.model.config.text_config,
            model.backbone.language_model.config,
        ):
            config._attn_implementation = "sdpa"
        for module in model.modules():
            if isinstance(module, Attention):
                module.set_processor(AttnProcessor2_0())
    else:
        policy.config.dtype = "bfloat16"
        policy.model.paligemma_with_expert.to_bfloat16_for_selected_params("bfloat16")
    return FloatPolicy(loaded), loaded.family


def use_tokens(config: Any, directory: Path) -> None:
    """Tell a vision-language model's configuration what the random checkpoint's small tokenizer calls an image."""
    number = PreTrainedTokenizerFast.from_pretrained(directory).convert_tokens_to_ids
    config.image_token_id, config.video_token_id = number("<|image_pad|>"), number("<|video_pad|>")
    config.vision_start_token_id = number("<|vision_start|>")
    config.vision_end_token_id = number("<|vision_end|>")


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.argument("engines", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--rounds", default=5, show_default=True)
def main(checkpoint: Path, engines: tuple[Path, ...], rounds: int) -> None:
    """Measure and print; keep the result."""
    threads = physical_cores()
    torch.set_num_threads(threads)
    lerobot, family = bfloat16_policy(checkpoint)
    reference = "lerobot bfloat16"
    times: dict[str, list[float]] = {reference: []}
    stages: dict[str, list[dict[str, float]]] = {}
    ours = {
        engine.parent.name: Policy.from_pretrained(engine, threads=threads) for engine in engines
    }
    used = memory()
    click.echo(f"all arms loaded, {used.resident_mb if used else 0:.0f} MiB")
    observation = random_observation(next(iter(ours.values())))
    for number in range(rounds + 1):
        noise = lerobot.sample_noise(number)
        taken = timed(lambda: lerobot.predict_action_chunk(observation, noise=noise))  # noqa: B023
        found = {reference: taken}
        for name, policy in ours.items():
            with policy.timing() as spans:
                found[name] = timed(lambda: policy.predict_action_chunk(observation, noise=noise))  # noqa: B023
            if number:
                sums = {stage: sum(values) / 1e6 for stage, values in spans.items()}
                stages.setdefault(name, []).append(sums)
        click.echo(f"round {number}: {', '.join(f'{n} {t:.0f} ms' for n, t in found.items())}")
        if number:
            for name, value in found.items():
                times.setdefault(name, []).append(value)
    arms = {
        name: Arm(
            (round(median(values), 1), round(min(values), 1), round(max(values), 1)),
            {
                stage: round(median(one[stage] for one in stages[name]), 1)
                for stage in (stages[name][0] if name in stages else ())
            },
        )
        for name, values in times.items()
    }
    ratios = {
        name: round(median(a / b for a, b in zip(times[reference], values, strict=True)), 2)
        for name, values in times.items()
        if name != reference
    }
    result = Comparison(family, rounds, threads, processor(), compiler_versions(), arms, ratios)
    click.echo(msgspec.json.format(msgspec.json.encode(result), indent=1).decode())
    kept = (
        msgspec.json.decode(RESULT.read_bytes(), type=list[Comparison]) if RESULT.is_file() else []
    )
    kept = [other for other in kept if other.policy != family] + [result]
    write_atomic(RESULT, msgspec.json.format(msgspec.json.encode(kept), indent=1) + b"\n")


def random_observation(policy: Policy) -> dict[str, Any]:
    """Return what `Policy.blank_observation` does, with random pixels and a sentence."""
    generator = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for key, value in policy.blank_observation().items():
        if isinstance(value, str):
            found[key] = "push the red block"
        elif value.dtype == np.uint8:
            found[key] = generator.integers(0, 256, value.shape, dtype=np.uint8)
        else:
            found[key] = value
    return found


def timed(call: Callable[[], Any]) -> float:
    """Return the milliseconds of a call."""
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e6


if __name__ == "__main__":
    main()
