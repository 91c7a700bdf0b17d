"""lerobot finds the plug-in, and its own scripts drive a compiled engine, with the runtime's actions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import quantvla
from quantvla.runtime.policy import Policy

ROOT = Path(quantvla.__file__).resolve().parent.parent
PLUGIN = ROOT / "plugins" / "lerobot_policy_quantvla"
STEPS = 6
CAMERA = "observation.images.corner2"


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plug-in's distribution, installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("plugin")
    source, target = folder / "source", folder / "installed"
    shutil.copytree(PLUGIN, source)  # building leaves files beside what it builds
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install")
    options = ("--no-deps", "--no-build-isolation", "--target")
    subprocess.run([*pip, *options, target, source], check=True)
    return target


def run(plugin: Path, script: str, *arguments: object) -> None:
    """Run a script beside this file where lerobot finds the plug-in."""
    command = [sys.executable, Path(__file__).with_name(script), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": f"{plugin}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_lerobot_eval_runs_the_engine_with_the_runtimes_actions(
    one_camera_engine: Path, plugin: Path, tmp_path: Path
) -> None:
    run(
        plugin,
        "short_eval.py",
        tmp_path / "record.npz",
        STEPS,
        "--policy.type=quantvla",
        f"--policy.engine={one_camera_engine}",
        "--policy.threads=1",
        f'--policy.rename_map={{"observation.image": "{CAMERA}"}}',
        "--env.type=metaworld",
        "--env.task=reach-v3",
        "--eval.n_episodes=1",
        "--eval.batch_size=1",
        "--seed=0",
        f"--output_dir={tmp_path / 'eval'}",
    )
    info = json.loads((tmp_path / "eval" / "eval_info.json").read_text())
    assert info["overall"]["n_episodes"] == 1
    data = np.load(tmp_path / "record.npz")
    assert len(data["actions"]) == STEPS
    first = len(data["pixels"]) - STEPS - 1  # resets before the first step show something too
    sentence = json.loads(_task_descriptions())["TASK_DESCRIPTIONS"]["reach-v3"]
    with Policy.from_pretrained(one_camera_engine, threads=1) as policy:
        for step, action in enumerate(data["actions"]):
            obs = {
                CAMERA: data["pixels"][first + step],
                "observation.state": data["state"][first + step],
                "task": sentence,
            }
            np.testing.assert_array_equal(action, policy.select_action(obs))


@pytest.mark.slow
def test_lerobot_rollout_sends_the_runtimes_actions_to_a_robot(
    one_camera_engine: Path, plugin: Path, tmp_path: Path
) -> None:
    run(
        plugin,
        "stub_rollout.py",
        tmp_path / "record.npz",
        "--policy.type=quantvla",
        f"--policy.engine={one_camera_engine}",
        "--policy.threads=1",
        f'--policy.rename_map={{"observation.images.top": "{CAMERA}"}}',
        "--robot.type=numbers",
        "--task=push the red block",
        "--fps=10",
        "--duration=1",
        "--return_to_initial_position=false",
    )
    data = np.load(tmp_path / "record.npz")
    actions = data["actions"]
    assert len(actions) >= 2
    first = len(data["top"]) - len(actions)  # it is looked at before the loop, too
    with Policy.from_pretrained(one_camera_engine, threads=1) as policy:
        for tick, action in enumerate(actions):
            obs = {
                CAMERA: data["top"][first + tick],
                "observation.state": data["state"][first + tick],
                "task": "push the red block",
            }
            np.testing.assert_array_equal(action.astype(np.float32), policy.select_action(obs))


def _task_descriptions() -> str:
    import lerobot.envs

    return (Path(lerobot.envs.__file__).parent / "metaworld_config.json").read_text()
