"""The steps that lerobot runs around the policy: names and the batch axis, no normalization."""

from __future__ import annotations

from typing import Any

from lerobot.lerobot_types import PolicyAction
from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
)
from lerobot.processor.factory import make_policy_processor_pipelines
from torch import Tensor

from quantvla.lerobot_policy.configuration_quantvla import QuantVLAConfig


def make_quantvla_pre_post_processors(
    config: QuantVLAConfig, dataset_stats: dict[str, dict[str, Tensor]] | None = None
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]],
    PolicyProcessorPipeline[PolicyAction, PolicyAction],
]:
    """Return the pipelines before and after the policy; ``dataset_stats`` are not used.

    The engine normalizes with the statistics it was compiled with.
    """
    pipelines: tuple[Any, Any] = make_policy_processor_pipelines(
        input_steps=[
            RenameObservationsProcessorStep(rename_map=config.rename_map),
            AddBatchDimensionProcessorStep(),
        ],
        output_steps=[DeviceProcessorStep(device="cpu")],
    )
    return pipelines
