"""The arms of a comparison: what a directory is, what its policy asks for, and how it is loaded.

Identifying an arm reads JSON only; weights are loaded where the episodes run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from quantvla.runtime.errors import explain
from quantvla.runtime.files import sha256_file, sha256_tree
from quantvla.runtime.manifest import MANIFEST_FILE, read_manifest

CHECKPOINT_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
QUANTIZED_FILE, QUANTIZED_POLICY = "quantized.json", "policy"
TASK_KEY = "task"


class ChunkPolicy(Protocol):
    """What the closed loop needs of a policy: an action chunk for an observation and a noise."""

    def predict_action_chunk(
        self,
        obs: Mapping[str, Any],
        /,
        *,
        noise: npt.NDArray[np.float32] | None = None,
        seed: int | None = None,
    ) -> npt.NDArray[np.float32]:
        """Return the actions (horizon, dim) in physical units."""
        ...


class Contract(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy reads and makes. ``execute`` of the ``horizon`` actions are run before the next chunk."""

    cameras: tuple[str, ...]
    state_key: str
    state_dim: int
    task_key: str
    action_dim: int
    horizon: int
    execute: int
    noise_shape: tuple[int, ...]

    @property
    def observation_keys(self) -> tuple[str, ...]:
        """The keys of an observation for this policy."""
        return (*self.cameras, self.state_key, self.task_key)


class Arm(msgspec.Struct, frozen=True, kw_only=True):
    """One named policy of a comparison: a LeRobot checkpoint, a quantized one, or an engine directory.

    ``denoise_steps`` None runs as many as the policy was made for.
    """

    name: str
    path: str
    kind: Literal["checkpoint", "quantized", "engine"]
    sha256: str
    contract: Contract
    denoise_steps: int | None = None


class _Feature(msgspec.Struct):
    type: str
    shape: tuple[int, ...]


class _PolicyConfig(msgspec.Struct):
    """The parts of a LeRobot ``config.json`` that say what the policy reads and makes."""

    type: str
    input_features: dict[str, _Feature]
    output_features: dict[str, _Feature]
    n_action_steps: int
    chunk_size: int
    max_action_dim: int


def identify_arm(name: str, directory: Path) -> Arm:
    """Return the arm in ``directory``: an engine if it has a manifest, a quantized checkpoint if it has a card,
    a LeRobot checkpoint if it has a config.

    Raises `QuantVLAError` for anything else.
    """
    if (directory / MANIFEST_FILE).is_file():
        return _engine_arm(name, directory)
    if (directory / QUANTIZED_FILE).is_file():
        return _checkpoint_arm(name, directory, "quantized", directory / QUANTIZED_POLICY)
    if (directory / CHECKPOINT_FILE).is_file() and (directory / WEIGHTS_FILE).is_file():
        return _checkpoint_arm(name, directory, "checkpoint", directory)
    found = "no such directory"
    if directory.is_dir():
        found = ", ".join(sorted(p.name for p in directory.iterdir())[:6]) or "an empty directory"
    raise explain(
        directory,
        f"neither a LeRobot checkpoint ({CHECKPOINT_FILE}, {WEIGHTS_FILE}), nor a quantized one "
        f"({QUANTIZED_FILE}), nor an engine ({MANIFEST_FILE})",
        got=found,
        remedy=f"give arm {name!r} a policy directory",
    )


def load_policy(arm: Arm) -> ChunkPolicy:
    """Load the policy of an arm with one thread, so that arms in parallel processes do not compete.

    A quantized checkpoint runs in the torch reference of its integers. Raises `QuantVLAError` for
    a checkpoint where lerobot is not installed.
    """
    if arm.kind == "engine":
        return _load_engine(arm)
    if importlib.util.find_spec("lerobot") is None:
        raise explain(
            arm.path,
            "a checkpoint needs lerobot, which is not installed",
            remedy="run `pip install quantvla[compile]`, or evaluate its engine",
        )
    if arm.kind == "checkpoint" and arm.denoise_steps is None:
        from quantvla.float_policy import FloatPolicy

        return FloatPolicy.from_pretrained(Path(arm.path), threads=1)
    from quantvla.staged_policy import StagedPolicy

    return StagedPolicy.from_pretrained(Path(arm.path), denoise_steps=arm.denoise_steps, threads=1)


def _load_engine(arm: Arm) -> ChunkPolicy:
    from quantvla.runtime.policy import Policy

    if arm.denoise_steps is None:
        return Policy.from_pretrained(arm.path, threads=1)
    from quantvla.runtime.engine import Engine
    from quantvla.runtime.manifest import check_files
    from quantvla.runtime.sampler import with_steps

    directory = Path(arm.path)
    manifest = read_manifest(directory)
    check_files(directory, manifest)
    # The graph of the loop runs the exported number of steps.
    manifest = msgspec.structs.replace(
        manifest, sampler=with_steps(manifest.sampler, arm.denoise_steps), loop=None
    )
    return Policy(directory, manifest, Engine(directory, manifest, threads=1))


def _engine_arm(name: str, directory: Path) -> Arm:
    manifest = read_manifest(directory)
    contract = Contract(
        cameras=tuple(camera.key for camera in manifest.cameras),
        state_key=manifest.state.key,
        state_dim=manifest.state.dim,
        task_key=manifest.task_key,
        action_dim=manifest.action.dim,
        horizon=manifest.action.horizon,
        execute=manifest.action.execute,
        noise_shape=manifest.sampler.noise_shape,
    )
    digest = sha256_file(directory / MANIFEST_FILE)
    return Arm(name=name, path=str(directory), kind="engine", sha256=digest, contract=contract)


def _checkpoint_arm(
    name: str, directory: Path, kind: Literal["checkpoint", "quantized"], policy: Path
) -> Arm:
    """Return the arm of a checkpoint whose configuration is in ``policy``."""
    path = policy / CHECKPOINT_FILE
    try:
        config = msgspec.json.decode(path.read_bytes(), type=_PolicyConfig)
    except (msgspec.ValidationError, msgspec.DecodeError, OSError) as error:
        raise explain(
            path,
            f"not the configuration of a chunk policy ({error})",
            remedy="give a LeRobot checkpoint of a flow-matching policy",
        ) from error
    features = config.input_features
    cameras = tuple(key for key, feature in features.items() if feature.type == "VISUAL")
    states = [(key, feature) for key, feature in features.items() if feature.type == "STATE"]
    actions = [f for f in config.output_features.values() if f.type == "ACTION"]
    if len(states) != 1 or len(actions) != 1:
        raise explain(
            path,
            "expected one state and one action feature",
            got=f"{len(states)} and {len(actions)}",
            remedy="evaluate a policy that reads one state vector and makes one action vector",
        )
    state_key, state = states[0]
    contract = Contract(
        cameras=cameras,
        state_key=state_key,
        state_dim=state.shape[0],
        task_key=TASK_KEY,
        action_dim=actions[0].shape[0],
        horizon=config.chunk_size,
        execute=config.n_action_steps,
        noise_shape=(1, config.chunk_size, config.max_action_dim),
    )
    digest = sha256_tree(directory)
    return Arm(name=name, path=str(directory), kind=kind, sha256=digest, contract=contract)
