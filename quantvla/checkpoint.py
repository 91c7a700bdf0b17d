"""The quantized checkpoint: a directory with integer weights, the float rest, and how it was made.

policy/                 the LeRobot checkpoint without the weights that are integers or dropped
quantized.safetensors   <site>.codes (`pack_codes`) and <site>.scales; added.<parameter> for float
                        parameters that the LeRobot checkpoint has no place for (a new bias)
quantized.json          `CheckpointCard`: recipe, plan, calibration, reports, checksums
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
import torch
from msgspec import structs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantvla.calib_sets import RobotSpec
from quantvla.families import load_policy
from quantvla.families.base import LoadedPolicy
from quantvla.families.lerobot_checkpoint import WEIGHTS_FILE, weight_shapes
from quantvla.float_weights import FloatWeights
from quantvla.passes.base import PassReport
from quantvla.plan import CARD_FILE, Plan
from quantvla.quantized_linear import QuantizedLinear
from quantvla.quantizer import QuantizedWeight, StaticInput, pack_codes, unpack_codes
from quantvla.recipe import Recipe
from quantvla.runtime.errors import explain
from quantvla.runtime.files import sha256_file

SCHEMA_VERSION = 1
WEIGHTS = "quantized.safetensors"
POLICY = "policy"
ADDED = "added."


class CalibrationUse(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which frames the statistics come from, of which robot, and how many inputs each site saw."""

    name: str
    sha256: str
    robot: RobotSpec
    frames: int
    seed: int
    samples: dict[str, int]


class CheckpointCard(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The content of ``quantized.json``."""

    schema_version: int
    family: str
    recipe: Recipe
    plan: Plan
    calibration: CalibrationUse
    reports: tuple[PassReport, ...]
    source_sha256: str
    files: dict[str, str]
    versions: dict[str, str]


def is_quantized(directory: Path) -> bool:
    """Return whether ``directory`` is a quantized checkpoint."""
    return (directory / CARD_FILE).is_file()


def write_checkpoint(
    directory: Path,
    loaded: LoadedPolicy,
    weights: Mapping[str, QuantizedWeight],
    card: CheckpointCard,
) -> None:
    """Fill ``directory``: the float rest of ``loaded``, the integer ``weights``, and the card."""
    _write_policy(directory / POLICY, loaded, absent_parameters(card.plan, loaded.policy))
    tensors = {ADDED + name: value for name, value in _added_parameters(loaded).items()}
    for site, weight in weights.items():
        tensors[f"{site}.codes"] = pack_codes(weight.codes, weight.bits)
        tensors[f"{site}.scales"] = weight.scales
        if weight.static is not None:
            tensors[f"{site}.transform"] = weight.static.transform
            tensors[f"{site}.input_scales"] = weight.static.scales
    save_file(tensors, directory / WEIGHTS)
    files = {
        path.relative_to(directory).as_posix(): sha256_file(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    card = msgspec.structs.replace(card, files=files)
    (directory / CARD_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(card), indent=1))


def _added_parameters(loaded: LoadedPolicy) -> dict[str, Tensor]:
    """Return the parameters that are new or of another shape than in the LeRobot checkpoint."""
    shapes = _stored_shapes(loaded)
    names = set(shapes)
    parameters = dict(loaded.policy.named_parameters(remove_duplicate=False))
    kept = {id(parameters[name]) for name in names & parameters.keys()}
    return {
        name: value.detach().contiguous()
        for name, value in parameters.items()
        if (name in names and shapes[name] != tuple(value.shape))
        or (name not in names and id(value) not in kept)  # a tied parameter has a stored twin
    }


def absent_parameters(plan: Plan, policy: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that the float rest does not carry."""
    names = {f"{entry.site}.weight" for entry in (*plan.quantized, *plan.dropped)}
    names |= {f"{entry.site}.bias" for entry in plan.dropped}
    return frozenset(names & dict(policy.named_parameters(remove_duplicate=False)).keys())


def _stored_shapes(loaded: LoadedPolicy) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the checkpoint's weights by the policy's names."""
    stored = weight_shapes(loaded.directory)
    renamed = {name: stored[old] for name, old in loaded.stored_names.items()}
    others = {
        name: shape for name, shape in stored.items() if name not in loaded.stored_names.values()
    }
    return others | renamed


def _write_policy(directory: Path, loaded: LoadedPolicy, absent: frozenset[str]) -> None:
    """Copy the checkpoint, and what loading it took from elsewhere.

    Parameters keep their stored type unless a pass gave them values it cannot hold.
    """
    shutil.copytree(loaded.directory, directory, ignore=shutil.ignore_patterns(WEIGHTS_FILE))
    for name, content in loaded.carried.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    current = loaded.policy.state_dict()
    kept = {}
    with safe_open(loaded.directory / WEIGHTS_FILE, framework="pt") as stored:
        for name in _stored_shapes(loaded):
            if name not in absent:
                value = current[name]
                original = stored.get_tensor(loaded.stored_names.get(name, name))
                if value.shape != original.shape:  # the new one is added beside it
                    value = original
                narrow = value.to(original.dtype)
                kept[name] = narrow if torch.equal(narrow.to(value.dtype), value) else value
    save_file({name: value.contiguous() for name, value in kept.items()}, directory / WEIGHTS_FILE)


def read_card(directory: Path) -> CheckpointCard:
    """Return the card of a quantized checkpoint after checking all its files."""
    path = directory / CARD_FILE
    if not path.is_file():
        raise explain(
            directory,
            f"not a quantized checkpoint (no {CARD_FILE})",
            remedy="run `quantvla quantize` first",
        )
    try:
        card = msgspec.json.decode(path.read_bytes(), type=CheckpointCard)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise explain(
            path, f"not readable by this version ({error})", remedy="quantize again"
        ) from error
    if card.schema_version != SCHEMA_VERSION:
        raise explain(
            path,
            f"schema version is not {SCHEMA_VERSION}",
            got=card.schema_version,
            remedy="quantize again",
        )
    for name, expected in card.files.items():
        file = directory / name
        if not file.is_file() or sha256_file(file) != expected:
            raise explain(file, "missing or changed since it was written", remedy="quantize again")
    return card


def read_weights(directory: Path, plan: Plan) -> dict[str, QuantizedWeight]:
    """Return the integer weights of all quantized sites of the plan."""
    tensors = load_file(directory / WEIGHTS)
    return {
        entry.site: QuantizedWeight(
            unpack_codes(tensors[f"{entry.site}.codes"], entry.scheme.weight_bits),
            tensors[f"{entry.site}.scales"],
            bits=entry.scheme.weight_bits, block=entry.scheme.block, inputs=entry.scheme.inputs,
            static=_static(tensors, entry.site),
        )
        for entry in plan.quantized
    }  # fmt: skip


def _static(tensors: Mapping[str, Tensor], site: str) -> StaticInput | None:
    if f"{site}.transform" not in tensors:
        return None
    return StaticInput(tensors[f"{site}.transform"], tensors[f"{site}.input_scales"])


def read_added(directory: Path) -> dict[str, Tensor]:
    """Return the float parameters that passes added, by name."""
    with safe_open(directory / WEIGHTS, framework="pt") as stored:
        names = [name for name in stored.keys() if name.startswith(ADDED)]  # noqa: SIM118
        return {name.removeprefix(ADDED): stored.get_tensor(name) for name in names}


def load_quantized(directory: Path) -> tuple[LoadedPolicy, CheckpointCard]:
    """Return the policy with its integer linears in place (`QuantizedLinear`), and the card."""
    card = read_card(directory)
    entries = (*card.plan.quantized, *card.plan.dropped)
    absent = frozenset(f"{entry.site}.{kind}" for entry in entries for kind in ("weight", "bias"))
    loaded = load_policy(directory / POLICY, absent)
    FloatWeights(loaded.policy).load_(read_added(directory))
    install_(loaded.policy, read_weights(directory, card.plan))
    return with_names(loaded, card.calibration.robot), card


def with_names(loaded: LoadedPolicy, robot: RobotSpec) -> LoadedPolicy:
    """Return the policy with the names of its state and action entries, which a checkpoint lacks and a robot has."""
    interface = loaded.interface
    state, action = interface.state, interface.action
    if not state.names and robot.state.dim == state.dim:
        state = structs.replace(state, names=robot.state.names)
    if not action.names and robot.action is not None and robot.action.dim == action.dim:
        action = structs.replace(action, names=robot.action.names)
    return replace(loaded, interface=replace(interface, state=state, action=action))


def install_(policy: nn.Module, weights: Mapping[str, QuantizedWeight]) -> None:
    """Replace the sites' linears by integer ones; biases stay."""
    for site, weight in weights.items():
        linear = policy.get_submodule(site)
        bias = linear.bias
        policy.set_submodule(
            site, QuantizedLinear(weight, bias if isinstance(bias, Tensor) else None)
        )
