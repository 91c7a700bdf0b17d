"""LeRobot's robot classes as robots of the control loop. Needs lerobot, and so torch, in this process."""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.errors import explain, nearest
from quantvla.runtime.manifest import Manifest
from quantvla.runtime.preprocess import Observation

_CAMERA_PREFIX = "observation.images."
_logger = logging.getLogger(__name__)


class LeRobotDevice(Protocol):
    """What is used of ``lerobot.robots.Robot``."""

    @property
    def observation_features(self) -> Mapping[str, Any]:
        """Type of every scalar and shape of every image of an observation."""
        ...

    @property
    def action_features(self) -> Mapping[str, Any]:
        """Type of every entry of an action."""
        ...

    def get_observation(self) -> Mapping[str, Any]:
        """Return scalars and images by name."""
        ...

    def send_action(self, action: dict[str, float]) -> Any:
        """Send targets by name."""
        ...

    def disconnect(self) -> None:
        """Free the ports."""
        ...


class LeRobotAdapter:
    """Turns a lerobot robot's named values into the vectors that the policy was trained with, and back.

    As when lerobot records: the state holds the robot's scalar features in their order, the action
    its action features in theirs, a camera ``front`` becomes ``observation.images.front`` unless
    ``cameras`` gives it another key. ``stop`` makes the last measured pose the target.
    """

    relative_actions: tuple[bool, ...] = ()
    slow_observe = False

    def __init__(
        self,
        device: LeRobotDevice,
        manifest: Manifest,
        *,
        task: str,
        cameras: Mapping[str, str] | None = None,
    ) -> None:
        """Check that the robot is the policy's. Raises `QuantVLAError` naming what differs."""
        self._device, self._task = device, task
        self._state_key, self._task_key = manifest.state.key, manifest.task_key
        features = device.observation_features
        self._scalars = tuple(k for k, kind in features.items() if not isinstance(kind, tuple))
        self._actions = tuple(device.action_features)
        renamed = dict(cameras or {})
        images = [k for k, kind in features.items() if isinstance(kind, tuple)]
        keys = {renamed.get(name, _CAMERA_PREFIX + name): name for name in images}
        self._cameras: dict[str, str] = {}
        for camera in manifest.cameras:
            if camera.key not in keys:
                raise explain(
                    "robot cameras", f"the policy needs {camera.key!r}", got=", ".join(keys) or "none",
                    remedy=f"{nearest(camera.key, keys)} or set robot.cameras",
                )  # fmt: skip
            self._cameras[camera.key] = keys[camera.key]
        _check_vector("robot state", self._scalars, manifest.state.dim, manifest.state.names)
        _check_vector("robot action", self._actions, manifest.action.dim, manifest.action.names)
        self._pose: dict[str, float] = {}

    def observe(self) -> Observation:
        """Return the robot's observation under the policy's keys."""
        found = self._device.get_observation()
        self._pose = {name: float(found[name]) for name in self._scalars}
        images = {key: np.asarray(found[name]) for key, name in self._cameras.items()}
        state = np.array([self._pose[name] for name in self._scalars], dtype=np.float32)
        return {**images, self._state_key: state, self._task_key: self._task}

    def act(self, action: NDArray[np.float32]) -> None:
        """Send the action's entries under their names."""
        self._device.send_action(dict(zip(self._actions, action.tolist(), strict=True)))

    def stop(self) -> None:
        """Make the last measured pose the target of every joint that has been measured."""
        target = {name: self._pose[name] for name in self._actions if name in self._pose}
        if len(target) == len(self._actions):
            self._device.send_action(target)

    def close(self) -> None:
        """Disconnect; what that does to the torque is the robot's configuration.

        A driver that refuses is a warning and no error: the run is over and its report must be seen.
        """
        try:
            self._device.disconnect()
        except Exception as error:  # drivers raise whatever they like
            _logger.warning("the robot could not be disconnected, check its torque: %s", error)


def connect(kind: str, options: Mapping[str, Any]) -> LeRobotDevice:
    """Return a connected lerobot robot of type ``kind``; ``options`` are the fields of its configuration.

    Raises `QuantVLAError` when lerobot is missing, does not know the type or refuses the options.
    """
    try:
        import draccus
        from lerobot.robots import RobotConfig, make_robot_from_config
        from lerobot.utils.import_utils import register_third_party_plugins
    except ImportError as error:
        raise explain(
            "robot kind 'lerobot'",
            "needs lerobot",
            got=error,
            remedy="install it here, or write a robot of kind 'python'",
        ) from error
    register_third_party_plugins()
    left_out = _register_types()
    missing = f"; without their drivers: {', '.join(left_out)}" if left_out else ""
    known = RobotConfig.get_known_choices()
    if kind not in known:
        raise explain(
            "robot type",
            "unknown to lerobot",
            got=repr(kind),
            remedy=nearest(kind, known) + missing,
        )
    try:
        config = draccus.decode(RobotConfig, {"type": kind, **options})
        device = make_robot_from_config(config)
        device.connect()
    except Exception as error:  # drivers raise whatever they like
        raise explain(
            f"robot {kind!r}",
            "cannot be connected",
            got=error,
            remedy="check robot.options" + missing,
        ) from error
    connected: LeRobotDevice = device
    return connected


def _register_types() -> list[str]:
    """Import lerobot's robot and camera packages, which register their types.

    Returns those that are left out because a library is missing, with its error.
    """
    left_out = []
    for parent in ("lerobot.robots", "lerobot.cameras"):
        for module in pkgutil.iter_modules(importlib.import_module(parent).__path__):
            if module.ispkg:
                name = f"{parent}.{module.name}"
                try:
                    importlib.import_module(name)
                except ImportError as error:
                    left_out.append(f"{name} ({error})")
    return left_out


def _check_vector(what: str, found: tuple[str, ...], dim: int, names: tuple[str, ...]) -> None:
    if len(found) != dim:
        raise explain(
            what, f"the policy has {dim} entries", got=f"{len(found)} ({', '.join(found)})",
            remedy="use the robot it was trained on",
        )  # fmt: skip
    if names and tuple(name.removesuffix(".pos") for name in names) != tuple(
        name.removesuffix(".pos") for name in found
    ):
        raise explain(
            what, f"the policy's order is {', '.join(names)}", got=", ".join(found),
            remedy="use the robot it was trained on",
        )  # fmt: skip
