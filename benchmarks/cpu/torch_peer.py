"""Time lerobot's own policy in PyTorch, float32 or under bfloat16 autocast. Prints JSON like `peer.py`.

python benchmarks/cpu/torch_peer.py CHECKPOINT INPUTS.npz OUTPUT.npy --precision bf16
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peer import Run, measure, parser

from quantvla.families import load_policy
from quantvla.families.base import Stage


def run_stage(stage: Stage, known: dict[str, Any]) -> dict[str, Any]:
    """Return a stage's named outputs; what autocast computes in bfloat16 is handed on in float32."""
    with torch.inference_mode():
        found = stage.module(*(torch.from_numpy(known[spec.name]) for spec in stage.inputs))
    values = found if isinstance(found, tuple) else (found,)
    return {
        spec.name: (value.float() if value.is_floating_point() else value).numpy()
        for spec, value in zip(stage.outputs, values, strict=True)
    }


def load_stages(checkpoint: Path) -> dict[str, Run]:
    """Return the policy's stages as functions of named arrays."""
    with redirect_stdout(sys.stderr):  # lerobot prints while it builds
        loaded = load_policy(checkpoint)
    return {stage.name: partial(run_stage, stage) for stage in loaded.stages}


def main() -> None:
    """Measure the checkpoint."""
    options = parser(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
        measure(options, partial(load_stages, options.directory))


if __name__ == "__main__":
    main()
