"""Reading a LeRobot checkpoint directory without trusting it: weights, processors, statistics."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from quantvla.runtime.errors import QuantVLAError, explain
from quantvla.runtime.processing_steps import FeatureStatistics

WEIGHTS_FILE = "model.safetensors"
PREPROCESSOR_FILE = "policy_preprocessor.json"
POSTPROCESSOR_FILE = "policy_postprocessor.json"


@dataclass(frozen=True)
class ProcessorStep:
    """One step of a saved lerobot pipeline: registry name, configuration, tensors file if it has one."""

    name: str
    config: dict[str, Any]
    state_file: Path | None


@contextmanager
def empty_parameters() -> Iterator[None]:
    """Have what is built in the block take no memory for parameters: they come from a file later.

    Buffers are real, and nothing moves between devices or types.
    """
    with (
        init_empty_weights(include_buffers=False),
        mock.patch.object(nn.Module, "to", lambda module, *_, **__: module),
    ):
        yield


def weight_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the stored weights by name, without reading them."""
    path = _weights_file(directory)
    try:
        with safe_open(path, framework="pt") as stored:
            return {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def load_weights_(
    policy: nn.Module,
    directory: Path,
    absent: frozenset[str],
    *,
    stored_names: Mapping[str, str] | None = None,
    in_place: bool = True,
) -> None:
    """Give ``policy`` the checkpoint's weights; every parameter must be there and none left over.

    lerobot loads non-strictly, so a policy with random layers can go unnoticed. Weights that the
    class ties to another one may be absent, and so may those of ``absent``. ``stored_names`` are
    names in the file of parameters that have another one there. Not ``in_place``, parameters are
    the file's own pages in memory, which the system can drop and read again; float32 as stored.
    """
    path = _weights_file(directory)
    try:
        state = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error
    for name, stored in (stored_names or {}).items():
        state[name] = state[stored]
    for stored in set((stored_names or {}).values()) - set(stored_names or {}):
        del state[stored]
    if not in_place:
        state = {name: value.float() for name, value in state.items()}
    try:
        missing, unexpected = policy.load_state_dict(state, strict=False, assign=not in_place)
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
    if not in_place:
        _fill_absent_(policy, absent)


def _fill_absent_(policy: nn.Module, absent: frozenset[str]) -> None:
    """Let absent parameters read as zeros that take no memory: what runs through them is never read."""
    for name, value in list(policy.named_parameters()):
        if value.is_meta and name in absent:
            module, _, leaf = name.rpartition(".")
            zeros = torch.zeros(()).expand(value.shape)
            policy.get_submodule(module).register_parameter(
                leaf, nn.Parameter(zeros, requires_grad=False)
            )


def _weights_file(directory: Path) -> Path:
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        raise explain(
            directory, f"has no {WEIGHTS_FILE}", remedy="copy the whole checkpoint directory"
        )
    return path


def _damaged(path: Path, error: Exception) -> QuantVLAError:
    return explain(
        path,
        "cannot be read as safetensors",
        got=error,
        remedy="the file is damaged: copy it again",
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
