"""The policies that this example can train, and the checkpoint directories they become.

A policy's file says how large it is, what it needs beside its weights, and how it is trained; everything else is the
same for all.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import groot_policy
import smolvla_policy
import torch
from learner import Objective
from safetensors.torch import save_file
from torch import Tensor

from quantvla.families import load_policy
from quantvla.families.base import LoadedPolicy
from quantvla.families.lerobot_checkpoint import WEIGHTS_FILE, weight_shapes
from quantvla.runtime.errors import explain
from quantvla.runtime.files import atomic_directory

Statistics = Mapping[str, dict[str, Tensor]]
"""``observation.state`` and ``action`` -> mean, std, min, max, (4,) each."""


@dataclass(frozen=True)
class PolicyType:
    """``write(directory, statistics)`` writes an untrained checkpoint; ``objective`` trains one that was loaded.

    ``directory``: where a trained one belongs, beside these scripts.
    """

    write: Callable[[Path, Statistics], None]
    objective: Callable[[LoadedPolicy], Objective]
    directory: str


POLICY_TYPES: dict[str, PolicyType] = {
    "smolvla": PolicyType(
        smolvla_policy.write_untrained, smolvla_policy.SmolVLAObjective, "policy"
    ),
    "groot": PolicyType(groot_policy.write_untrained, groot_policy.GrootObjective, "policy_groot"),
}


def write_untrained(policy_type: str, directory: Path, statistics: Statistics) -> None:
    """Write an untrained checkpoint to ``directory`` unless a complete one is there; always the same weights."""
    if directory.exists():
        return
    torch.manual_seed(0)
    with atomic_directory(directory) as partial:
        POLICY_TYPES[policy_type].write(partial, statistics)


def load_for_training(policy_type: str, directory: Path) -> LoadedPolicy:
    """Load a checkpoint; all its parameters are trainable but those of a head on tokens, which nothing reads.

    lerobot freezes what a fine-tuning leaves alone; nothing is pretrained here. Raises `QuantVLAError` for a
    checkpoint of another policy type.
    """
    loaded = load_policy(directory)
    if loaded.family != policy_type:
        raise explain(
            directory,
            f"expected a checkpoint of policy type {policy_type!r}",
            got=repr(loaded.family),
            remedy="give each policy type its own --out and --export",
        )
    unread = {site.name + ".weight" for site in loaded.sites if site.kind == "lm_head"}
    for name, parameter in loaded.policy.named_parameters():
        parameter.requires_grad = name not in unread
        parameter.data = parameter.data.clone()  # not the file's own pages
    return loaded


def write_trained(loaded: LoadedPolicy, trained: Mapping[str, Tensor], directory: Path) -> None:
    """Write a copy of a loaded checkpoint with the ``trained`` parameters, in half precision, whole or not at all."""
    known = {**loaded.policy.state_dict(), **trained}
    own_name = {stored: name for name, stored in loaded.stored_names.items()}
    weights = {
        name: known[own_name.get(name, name)].detach().half().contiguous()
        for name in weight_shapes(loaded.directory)
    }
    others = shutil.ignore_patterns(WEIGHTS_FILE)
    with atomic_directory(directory, overwrite=True) as partial:
        shutil.copytree(loaded.directory, partial, ignore=others, dirs_exist_ok=True)
        save_file(weights, partial / WEIGHTS_FILE, metadata={"format": "pt"})
