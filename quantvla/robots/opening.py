"""From a run file's robot section to a robot."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from quantvla.run_config import LeRobotSpec, MetaWorldSpec, PythonSpec, RecordedSpec, RobotSpec
from quantvla.runtime.control.robot import Robot
from quantvla.runtime.errors import explain
from quantvla.runtime.manifest import Manifest


@contextmanager
def opened_robot(spec: RobotSpec, manifest: Manifest) -> Iterator[Robot]:
    """Yield the robot of a run file, made for an engine's inputs; closed at the end if it can be."""
    robot = _open(spec, manifest)
    try:
        yield robot
    finally:
        close: Callable[[], None] | None = getattr(robot, "close", None)
        if close is not None:
            close()


def relative_actions(robot: Robot) -> tuple[bool, ...]:
    """Return which entries of its actions are displacements, as the robot says; none if it does not say."""
    return tuple(getattr(robot, "relative_actions", ()))


def slow_observe(robot: Robot) -> bool:
    """Return whether the robot asks to be observed only when a chunk is to be computed."""
    return bool(getattr(robot, "slow_observe", False))


def _open(spec: RobotSpec, manifest: Manifest) -> Robot:
    if isinstance(spec, MetaWorldSpec):
        from quantvla.robots.metaworld import MetaWorldRobot

        return MetaWorldRobot(
            spec.task, seed=spec.seed, episode=spec.episode, keys=manifest.observation_keys
        )
    if isinstance(spec, RecordedSpec):
        from quantvla.robots.recorded import RecordedRobot

        return RecordedRobot(spec.path, manifest, frames=spec.frames, repeat=spec.repeat)
    if isinstance(spec, LeRobotSpec):
        from quantvla.robots.lerobot_robot import LeRobotAdapter, connect

        device = connect(spec.type, spec.options)
        return LeRobotAdapter(device, manifest, task=spec.task, cameras=spec.cameras)
    return _own(spec)


def _own(spec: PythonSpec) -> Robot:
    """Return what the user's factory makes, if it has the three methods of a robot."""
    module, _, name = spec.factory.partition(":")
    try:
        factory: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise explain(
            "robot factory",
            "expected 'module:callable' that can be imported",
            got=f"{spec.factory!r} ({error})",
            remedy="correct robot.factory or set PYTHONPATH",
        ) from error
    robot: Robot = factory(**spec.options)
    missing = [n for n in ("observe", "act", "stop") if not callable(getattr(robot, n, None))]
    if missing:
        raise explain(
            f"robot {spec.factory!r}",
            f"has no {', '.join(missing)}",
            remedy="add the methods of Robot",
        )
    return robot
