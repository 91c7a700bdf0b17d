"""A vision stage that takes one camera at a time, so that the runtime can leave out those that have not changed."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from quantvla.families.base import LoadedPolicy, Stage
from quantvla.runtime.errors import explain
from quantvla.runtime.manifest import TensorSpec
from quantvla.runtime.processing_steps import Images


def cameras_apart(loaded: LoadedPolicy) -> LoadedPolicy:
    """Return the policy with the stages that read pictures only made for one, run once a camera.

    Raises `QuantVLAError` for a policy of one camera.
    """
    cameras = {
        step.output: len(step.keys) for step in loaded.interface.preprocess if isinstance(step, Images)
    }  # fmt: skip
    stages = tuple(_apart(stage, cameras) for stage in loaded.stages)
    if stages == loaded.stages:
        raise explain(
            "--cameras-apart", "the policy's vision has one camera", remedy="leave it out"
        )
    return replace(loaded, stages=stages)


def _apart(stage: Stage, cameras: dict[str, int]) -> Stage:
    rows = {cameras.get(spec.name, 1) for spec in stage.inputs}
    if len(rows) != 1 or rows == {1}:
        return stage
    return replace(stage, inputs=_one(stage.inputs), outputs=_one(stage.outputs), repeat=rows.pop())


def _one(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    return tuple(msgspec.structs.replace(spec, shape=(1, *spec.shape[1:])) for spec in specs)
