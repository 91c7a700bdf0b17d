"""The parts of an interface that LeRobot checkpoints share: features, normalization, tokenizer, relative actions."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import NormalizationMode
from lerobot.processor import RelativeActionsProcessorStep
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from quantvla.families.lerobot_checkpoint import (
    POSTPROCESSOR_FILE,
    PREPROCESSOR_FILE,
    ProcessorStep,
    find_step,
    processor_steps,
    refuse_unknown_steps,
)
from quantvla.runtime.errors import explain
from quantvla.runtime.manifest import ActionSpec, CameraSpec, EulerSampler, VectorSpec
from quantvla.runtime.processing_steps import (
    AddState,
    FeatureStatistics,
    Normalize,
    PostprocessStep,
    Unnormalize,
)

STATE_KEY, ACTION_KEY, TASK_KEY = "observation.state", "action", "task"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_DIRECTORY = "tokenizer"
ORIGIN = "origin"
_PREPROCESSOR_STEPS = frozenset(
    {
        "rename_observations_processor",
        "to_batch_processor",
        "tokenizer_processor",
        "device_processor",
        "normalizer_processor",
    }
)
_POSTPROCESSOR_STEPS = frozenset({"unnormalizer_processor", "device_processor"})
_RELATIVE, _ABSOLUTE = "relative_actions_processor", "absolute_actions_processor"

Steps = tuple[ProcessorStep, ...]


def read_processors(directory: Path, known: frozenset[str] = frozenset()) -> tuple[Steps, Steps]:
    """Return the steps before and after the policy; ``known`` are those that this family adds.

    Raises `QuantVLAError` for a step that cannot be reproduced on the robot.
    """
    before = processor_steps(directory, PREPROCESSOR_FILE)
    after = processor_steps(directory, POSTPROCESSOR_FILE)
    refuse_unknown_steps(before, _PREPROCESSOR_STEPS | known, directory / PREPROCESSOR_FILE)
    refuse_unknown_steps(after, _POSTPROCESSOR_STEPS | known, directory / POSTPROCESSOR_FILE)
    return before, after


def mode(config: dict[str, Any], feature: str) -> Any:
    """Return how a (un)normalizer step treats a feature type (STATE, ACTION, VISUAL)."""
    modes = config.get("norm_map", {})
    return NormalizationMode(modes.get(feature, "IDENTITY")).value.lower()


def features(directory: Path, config: PreTrainedConfig) -> tuple[VectorSpec, int]:
    """Return the state and the number of action entries; a policy without either is refused."""
    state, action = config.robot_state_feature, config.action_feature
    if state is None or action is None:
        raise explain(
            directory / "config.json",
            "has no state or no action feature",
            remedy="use a policy with both",
        )
    return VectorSpec(key=STATE_KEY, dim=int(state.shape[0])), int(action.shape[0])


def cameras(directory: Path, config: PreTrainedConfig, before: Steps) -> tuple[CameraSpec, ...]:
    """Return the cameras by the names the robot has for them, without those that are always empty."""
    step = find_step(before, "rename_observations_processor", PREPROCESSOR_FILE)
    renames = step.config.get("rename_map") or {}
    robot_name = {policy: robot for robot, policy in renames.items()}
    if renames.get(STATE_KEY) or STATE_KEY in robot_name:
        raise explain(
            directory / PREPROCESSOR_FILE,
            "renames the state",
            got=renames,
            remedy=f"record it as {STATE_KEY}",
        )
    keys = [key for key in config.image_features if ".empty_camera_" not in key]
    if not keys:
        raise explain(
            directory / "config.json", "names no camera", remedy="use a policy with image inputs"
        )
    return tuple(
        CameraSpec(key=robot_name.get(key, key), height=int(shape[1]), width=int(shape[2]))
        for key in keys
        for shape in [config.image_features[key].shape]
    )


def refuse_normalized_images(directory: Path, normalizer: dict[str, Any]) -> None:
    """Raise unless images reach the policy as they are; it normalizes them itself."""
    if mode(normalizer, "VISUAL") != "identity":
        raise explain(
            directory / PREPROCESSOR_FILE,
            "normalizes images, which the policy does itself",
            got=mode(normalizer, "VISUAL"),
            remedy="train with VISUAL: IDENTITY",
        )


def normalize_state(normalizer: dict[str, Any], output: str, pad_to: int) -> Normalize:
    """Return the step that normalizes the state like the checkpoint's own."""
    return Normalize(
        key=STATE_KEY, output=output, mode=mode(normalizer, "STATE"),
        eps=float(normalizer.get("eps", 1e-8)), pad_to=pad_to,
    )  # fmt: skip


def unnormalize_action(unnormalizer: dict[str, Any], dim: int) -> Unnormalize:
    """Return the step that undoes the normalization of actions."""
    return Unnormalize(
        key=ACTION_KEY, mode=mode(unnormalizer, "ACTION"),
        eps=float(unnormalizer.get("eps", 1e-8)), dim=dim,
    )  # fmt: skip


def relative_actions(
    directory: Path, before: Steps, after: Steps, state: VectorSpec, dim: int
) -> tuple[tuple[Normalize, ...], tuple[PostprocessStep, ...]]:
    """Return the steps before and after for actions relative to the state; none if they are absolute."""
    first = next((step for step in before if step.name == _RELATIVE), None)
    last = next((step for step in after if step.name == _ABSOLUTE), None)
    if last is None or not last.config.get("enabled", False):
        return (), ()
    if first is None:
        raise explain(
            directory / PREPROCESSOR_FILE,
            f"has no {_RELATIVE}, which {_ABSOLUTE} needs",
            remedy="save the policy's processors again with lerobot",
        )
    if state.dim < dim:
        raise explain(
            directory / "config.json",
            f"actions of {dim} entries are relative to a state of fewer",
            got=state.dim,
            remedy="use a policy whose state measures what its actions command",
        )
    mask = RelativeActionsProcessorStep(**first.config)._build_mask(dim)
    origin = Normalize(key=STATE_KEY, output=ORIGIN, mode="identity", eps=1e-8, pad_to=state.dim)
    return (origin,), (AddState(tensor=ORIGIN, mask=tuple(mask)),)


def action_spec(config: Any, dim: int) -> ActionSpec:
    """Return what a chunk of this policy is."""
    return ActionSpec(horizon=config.chunk_size, execute=config.n_action_steps, dim=dim)


def flow_sampler(config: Any, steps: int) -> EulerSampler:
    """Return the sampler of lerobot's flow-matching policies: from noise at 1 to actions at 0."""
    step = -1.0 / steps
    return EulerSampler(
        stage="denoise", state="x", time="timestep", velocity="velocity",
        timesteps=tuple(1.0 + index * step for index in range(steps)),
        step=step, noise_shape=(1, config.chunk_size, config.max_action_dim),
    )  # fmt: skip


def vector_statistics(found: dict[str, FeatureStatistics]) -> dict[str, FeatureStatistics]:
    """Return the statistics of state and action alone."""
    return {key: found[key] for key in (STATE_KEY, ACTION_KEY) if key in found}


def tokenizer_place(directory: Path, name: str) -> str:
    """Return where the tokenizer called ``name`` is: a directory in the checkpoint, or the name."""
    inside = (directory / TOKENIZER_DIRECTORY, directory / name)
    return next((str(path) for path in inside if (path / TOKENIZER_FILE).is_file()), name)


def find_tokenizer(directory: Path, name: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer that a step of a checkpoint's preprocessor names.

    Looked for in the checkpoint (``tokenizer/``, or the name as a directory in it), and in
    what this machine has from a hub. Raises `QuantVLAError` when it is nowhere.
    """
    try:
        return AutoTokenizer.from_pretrained(
            tokenizer_place(directory, name), local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise explain(
            directory / PREPROCESSOR_FILE,
            "its tokenizer is not on this machine",
            got=name,
            remedy=f"copy that model's tokenizer files into the checkpoint as "
            f"`{TOKENIZER_DIRECTORY}/`",
        ) from error


def tokenizer_files(tokenizer: PreTrainedTokenizerFast) -> dict[str, bytes]:
    """Return the tokenizer's files, by the path that `find_tokenizer` looks for in a checkpoint."""
    with TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        return {
            f"{TOKENIZER_DIRECTORY}/{path.name}": path.read_bytes()
            for path in sorted(Path(directory).iterdir())
            if path.is_file()
        }
