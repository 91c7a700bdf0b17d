"""pi0, pi0.5 and GR00T N1.7 at their released size: memory and time of quantization, export and one chunk.

    python -m benchmarks.families.full_size make pi05 build/full_size/pi05
    python -m benchmarks.families.full_size run build/full_size/pi05 --recipe rtn-w4a8

``make`` writes a checkpoint with random weights tensor by tensor (float32 as lerobot saves it, so
16.6 GB for pi0.5). ``run`` quantizes it on a few random frames, exports the engine and runs a chunk, each in a
process of its own, and adds a line to ``benchmarks/families/full_size.json``. Memory is what the process
allocates (``RssAnon``), sampled; pages of files, which the system can drop and read again, are apart.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
from lerobot.policies.groot.groot_n1_7 import GR00TN17Config
from torch import nn

from quantvla.calib_sets import limit, open_set
from quantvla.checkpoint import read_card
from quantvla.families import groot as groot_family
from quantvla.families import policy_type
from quantvla.families.groot.interface import BASE_DIRECTORY
from quantvla.families.lerobot_checkpoint import WEIGHTS_FILE
from quantvla.families.lerobot_interface import TOKENIZER_DIRECTORY
from quantvla.families.pi import KINDS, empty_policy
from quantvla.quantize import quantize
from quantvla.recipe import read_recipe
from quantvla.runtime.files import write_atomic
from quantvla.runtime.policy import Policy
from quantvla.tensor_file import header
from quantvla.testing import groot, pi
from quantvla.testing.statistics import random_statistics

MODULE = "benchmarks.families.full_size"
RESULT = Path(__file__).parent / "full_size.json"
TEXTS = ("push the red block", "open the door")


class Step(msgspec.Struct, frozen=True):
    """Seconds, and the most memory allocated (GiB) and mapped from files (GiB) during a step."""

    seconds: float
    allocated_gib: float
    mapped_gib: float


class Run(msgspec.Struct, frozen=True):
    """One policy through one recipe. ``saving`` is of the integer linears against FP16."""

    policy: str
    recipe: str
    frames: int
    quantize: Step
    export: Step
    chunk: Step
    engine_gb: float
    saving: float
    stages_ms: dict[str, float]


# ------------------------------------------------------------------------------------ checkpoint
def make_pi(kind: str, directory: Path) -> nn.Module:
    """Write everything but the weights; return the policy without memory."""
    size = pi.FULL_SIZE
    config = pi.make_config(kind, size)
    config.save_pretrained(directory)
    pi.save_processors(config, size, directory, seed=0, texts=TEXTS)
    policy: nn.Module = empty_policy(KINDS[kind], config, size.widths)
    return policy


def make_groot(directory: Path) -> nn.Module:
    """Write everything but the weights; return the policy without memory."""
    size = groot.FULL_SIZE
    groot.write_processor(directory / TOKENIZER_DIRECTORY, size, TEXTS)
    base: Any = GR00TN17Config(architectures=["Gr00tN1d7"])
    base.save_pretrained(directory / BASE_DIRECTORY)
    config = groot.make_config(directory, size)
    statistics = random_statistics(size.state_dim, size.action_dim, seed=0)
    groot.save_processors(config, size, directory, statistics)
    policy: nn.Module = groot_family.empty_policy(config, base)
    config.base_model_path = BASE_DIRECTORY
    config.save_pretrained(directory)
    return policy


def write_weights(policy: nn.Module, path: Path, seed: int = 0) -> None:
    """Write random float32 weights of every parameter, one at a time, in the safetensors format."""
    shapes = {name: tuple(value.shape) for name, value in policy.named_parameters()}
    generator = np.random.default_rng(seed)
    with path.open("wb") as stream:
        stream.write(header(shapes))
        for name, shape in shapes.items():
            stream.write(random_weight(generator, name, shape).data)


def random_weight(
    generator: np.random.Generator, name: str, shape: tuple[int, ...]
) -> np.ndarray[Any, Any]:
    """Return weights that keep activations of the size they enter with; gains of LayerNorms are 1."""
    values = generator.standard_normal(shape, np.float32)
    if len(shape) > 1:
        fan_in = shape[-2] if name.endswith(".W") else int(np.prod(shape[1:]))
        return values * np.float32(1 / np.sqrt(fan_in))
    one_is_neutral = "layer_norm" in name or ("norm" in name and "paligemma" not in name)
    centre = 1.0 if name.endswith("weight") and one_is_neutral and "gemma" not in name else 0.0
    return values * np.float32(0.05) + np.float32(centre)


# --------------------------------------------------------------------------------------- measuring
def measured(*arguments: object) -> Step:
    """Run a command of Python in a process of its own and sample its memory."""
    command = [sys.executable, "-m", *map(str, arguments)]
    click.echo(f"$ python {' '.join(command[1:])}")
    most = {"RssAnon": 0, "RssFile": 0}
    begin = time.perf_counter()
    child = subprocess.Popen(command)
    while child.poll() is None:
        status = Path(f"/proc/{child.pid}/status").read_text()
        for key in most:
            found = status.split(f"{key}:")[1:]  # nothing of a process that has just ended
            most[key] = max([most[key], *(int(part.split()[0]) * 1024 for part in found)])
        time.sleep(0.05)
    seconds = time.perf_counter() - begin
    if child.returncode:
        sys.exit(child.returncode)
    gib = {key: round(value / 2**30, 2) for key, value in most.items()}
    step = Step(round(seconds, 1), gib["RssAnon"], gib["RssFile"])
    click.echo(str(step))
    return step


def write_frames(directory: Path, kind: str, count: int) -> None:
    """Write a calibration set of ``count`` random frames."""
    shutil.rmtree(directory, ignore_errors=True)
    size: Any = groot.FULL_SIZE if kind == "groot" else pi.FULL_SIZE
    directory.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        generator = np.random.default_rng(index)
        shape = (size.camera_height, size.camera_width, 3)
        images = {key: generator.integers(0, 256, shape, dtype=np.uint8) for key in size.cameras}
        state = generator.standard_normal(size.state_dim).astype(np.float32)
        np.savez(
            directory / f"{index}.npz", **images, **{"observation.state": state},
            task=TEXTS[index % 2], episode=index // 4, frame=index % 4,
        )  # fmt: skip


@click.group()
def main() -> None:
    """Make a checkpoint of the released size, or run one through the compiler."""


@main.command()
@click.argument("kind", type=click.Choice([*KINDS, "groot"]))
@click.argument("directory", type=click.Path(path_type=Path))
def make(kind: str, directory: Path) -> None:
    """Write a random-weight checkpoint of the released size."""
    directory.mkdir(parents=True)
    policy = make_groot(directory) if kind == "groot" else make_pi(kind, directory)
    write_weights(policy, directory / WEIGHTS_FILE)


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option("--recipe", default="rtn-w4a8", show_default=True)
@click.option("--frames", default=4, show_default=True, help="Random frames to calibrate with.")
@click.option("--again", is_flag=True, help="Export and run what an earlier run quantized.")
def run(checkpoint: Path, recipe: str, frames: int, again: bool) -> None:
    """Quantize, export and run a chunk, each in its own process; print and keep the figures."""
    kind = policy_type(checkpoint)
    work = checkpoint.with_name(f"{checkpoint.name}-{recipe}")
    quantized, engine, chunk = work / "checkpoint", work / "engine", work / "chunk.json"
    kept = msgspec.json.decode(RESULT.read_bytes(), type=list[Run]) if RESULT.is_file() else []
    earlier = next((r for r in kept if again and (r.policy, r.recipe) == (kind, recipe)), None)
    if earlier is None:
        first = measured(MODULE, "quantize", checkpoint, quantized, f"--recipe={recipe}", f"--frames={frames}")  # fmt: skip
    else:
        first, frames = earlier.quantize, earlier.frames
    exported = measured("quantvla", "export", quantized, "-o", engine, "--overwrite")
    ran = measured(MODULE, "chunk", engine, chunk)
    found = Run(
        kind, recipe, frames, first, exported, ran,
        engine_gb=round(sum(path.stat().st_size for path in engine.iterdir()) / 1e9, 3),
        saving=round(read_card(quantized).plan.saving(), 4),
        stages_ms=msgspec.json.decode(chunk.read_bytes()),
    )  # fmt: skip
    click.echo(msgspec.json.format(msgspec.json.encode(found), indent=1).decode())
    kept = [r for r in kept if (r.policy, r.recipe) != (kind, recipe)] + [found]
    write_atomic(RESULT, msgspec.json.format(msgspec.json.encode(kept), indent=1) + b"\n")


@main.command("quantize")
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--recipe", default="rtn-w4a8", show_default=True)
@click.option("--frames", default=4, show_default=True, help="Random frames to calibrate with.")
def quantize_only(checkpoint: Path, output: Path, recipe: str, frames: int) -> None:
    """Quantize on random frames, or continue a run that was killed."""
    folder = output.with_name("frames")
    write_frames(folder, policy_type(checkpoint), 2 * frames + 4)  # some of a set are held out
    calibration = limit(open_set(folder), frames=frames, seed=0).part("calibration")
    quantize(checkpoint, calibration, read_recipe(recipe), output, overwrite=True, progress=_say)


@main.command()
@click.argument("engine", type=click.Path(path_type=Path, exists=True))
@click.argument("output", type=click.Path(path_type=Path))
def chunk(engine: Path, output: Path) -> None:
    """Load an engine and run two chunks; write the milliseconds of the second."""
    with Policy.from_pretrained(engine) as policy:
        observation = policy.blank_observation()
        policy.predict_action_chunk(observation, seed=0)
        with policy.timing() as durations:
            policy.predict_action_chunk(observation, seed=0)
    stages = {name: round(sum(spans) / 1e6, 1) for name, spans in durations.items()}
    output.write_bytes(msgspec.json.encode(stages))


def _say(what: str, done: int, total: int) -> None:
    if done % 16 == 0 or done == total or total < 16:
        click.echo(f"{what}: {done}/{total}", err=True)


if __name__ == "__main__":
    main()
