"""Reading a LeRobot checkpoint directory without trusting it: weights, processors, statistics."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from quantvla.runtime.errors import explain
from quantvla.runtime.manifest import FeatureStatistics

WEIGHTS_FILE = "model.safetensors"
PREPROCESSOR_FILE = "policy_preprocessor.json"
POSTPROCESSOR_FILE = "policy_postprocessor.json"


@dataclass(frozen=True)
class ProcessorStep:
    """One step of a saved lerobot pipeline: registry name, configuration, tensors file if it has one."""

    name: str
    config: dict[str, Any]
    state_file: Path | None


def load_weights_(policy: nn.Module, directory: Path, absent: frozenset[str]) -> None:
    """Copy the checkpoint's weights into ``policy``; every parameter must be there and none left over.

    lerobot loads non-strictly, so a policy with random layers can go unnoticed. Weights that the
    class ties to another one may be absent, and so may those of ``absent``.
    """
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        raise explain(
            directory, f"has no {WEIGHTS_FILE}", remedy="copy the whole checkpoint directory"
        )
    try:
        state = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise explain(
            path,
            "cannot be read as safetensors",
            got=error,
            remedy="the file is damaged: copy it again",
        ) from error
    try:
        missing, unexpected = policy.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise explain(
            path,
            "weights have other shapes than the configuration says",
            got=str(error).splitlines()[-1].strip(),
            remedy="use the config.json that was saved with these weights",
        ) from error
    missing = [n for n in missing if n not in absent and not _is_tied(policy, n, state.keys())]
    if missing or unexpected:
        raise explain(
            path,
            "weights do not match the policy",
            got=f"{len(missing)} missing ({', '.join(missing[:3])}), "
            f"{len(unexpected)} unexpected ({', '.join(unexpected[:3])})",
            remedy="use the config.json that was saved with these weights",
        )


def _is_tied(policy: nn.Module, name: str, present: Any) -> bool:
    parameters = dict(policy.named_parameters(remove_duplicate=False))
    own = parameters.get(name)
    return own is not None and any(
        other is own and other_name in present for other_name, other in parameters.items()
    )


def processor_steps(directory: Path, file: str) -> tuple[ProcessorStep, ...]:
    """Return the steps of a saved pipeline in order."""
    path = directory / file
    if not path.is_file():
        raise explain(
            directory,
            f"has no {file}, so normalization is unknown",
            remedy="save the processors beside the policy (lerobot's pipeline.save_pretrained) "
            "or migrate the checkpoint with lerobot's migration script",
        )
    try:
        steps = json.loads(path.read_text())["steps"]
        return tuple(
            ProcessorStep(
                name=step.get("registry_name") or step["class"],
                config=step.get("config", {}),
                state_file=directory / step["state_file"] if step.get("state_file") else None,
            )
            for step in steps
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise explain(
            path, f"is not a saved lerobot pipeline ({error!r})", remedy="save it again"
        ) from error


def find_step(steps: tuple[ProcessorStep, ...], name: str, file: str) -> ProcessorStep:
    """Return the one step registered as ``name``; a pipeline without it is refused."""
    for step in steps:
        if step.name == name:
            return step
    raise explain(
        file, f"has no step {name!r}", remedy="save the policy's processors again with lerobot"
    )


def refuse_unknown_steps(
    steps: tuple[ProcessorStep, ...], known: frozenset[str], file: Path
) -> None:
    """Raise for a step this compiler cannot reproduce on the robot."""
    for step in steps:
        if step.name not in known:
            raise explain(
                file,
                "has a processor step that cannot be reproduced at run time",
                got=repr(step.name),
                remedy=f"known steps: {', '.join(sorted(known))}",
            )


def statistics(step: ProcessorStep) -> dict[str, FeatureStatistics]:
    """Return the normalization statistics a (un)normalizer step carries, by feature key."""
    if step.state_file is None or not step.state_file.is_file():
        raise explain(
            step.state_file or step.name,
            "normalization statistics are missing",
            remedy="copy the whole checkpoint directory, or save the processors with dataset_stats",
        )
    found: dict[str, dict[str, tuple[float, ...]]] = {}
    with safe_open(step.state_file, framework="numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
            key, _, statistic = name.rpartition(".")
            if statistic in FeatureStatistics.__struct_fields__:
                values = tensors.get_tensor(name).astype("float64").reshape(-1).tolist()
                found.setdefault(key, {})[statistic] = tuple(values)
    return {key: FeatureStatistics(**values) for key, values in found.items()}
