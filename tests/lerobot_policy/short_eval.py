"""lerobot's own eval script on one short Meta-World episode; writes what the environment showed and got.

usage: short_eval.py RECORD.npz STEPS [arguments of lerobot-eval]
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from lerobot.envs.metaworld import MetaworldEnv
from lerobot.scripts.lerobot_eval import main

record, steps = sys.argv[1], int(sys.argv[2])
sys.argv[1:] = sys.argv[3:]
shown: list[dict[str, Any]] = []
done: list[np.ndarray] = []
made, formatted, stepped = MetaworldEnv.__init__, MetaworldEnv._format_raw_obs, MetaworldEnv.step


def short(self: Any, *arguments: Any, **options: Any) -> None:
    made(self, *arguments, **options)
    self._max_episode_steps = steps  # lerobot fixes it at 500


def showing(self: Any, raw: np.ndarray) -> Any:
    shown.append(formatted(self, raw))
    return shown[-1]


def doing(self: Any, action: np.ndarray) -> Any:
    done.append(action.copy())
    return stepped(self, action)


MetaworldEnv.__init__, MetaworldEnv._format_raw_obs, MetaworldEnv.step = short, showing, doing
main()
np.savez(
    record,
    pixels=np.stack([obs["pixels"] for obs in shown]),
    state=np.stack([obs["agent_pos"] for obs in shown]),
    actions=np.stack(done),
)
