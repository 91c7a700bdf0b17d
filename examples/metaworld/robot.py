"""What every policy of this example has in common: the robot's cameras, state and actions, the chunk, the instructions."""

from __future__ import annotations

from quantvla.evaluate.metaworld import CAMERA_KEY_PREFIX, CAMERAS

IMAGE_SIZE = 128
CAMERA_KEYS = tuple(CAMERA_KEY_PREFIX + camera for camera in CAMERAS)
CHUNK_SIZE = 16
EXECUTED_STEPS = 8
VOCAB_SIZE = 512


def instructions() -> list[str]:
    """Return the 50 Meta-World instructions, which the tokenizers are trained on."""
    # Not at the top: it imports mujoco, which must find MUJOCO_GL set.
    from lerobot.envs.metaworld import TASK_DESCRIPTIONS

    return sorted(TASK_DESCRIPTIONS.values())
