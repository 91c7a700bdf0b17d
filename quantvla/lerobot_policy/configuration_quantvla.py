"""``--policy.type=quantvla --policy.engine=DIR``: what lerobot may set, and what the engine's manifest says."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig

from quantvla.runtime.errors import QuantVLAError, explain, nearest
from quantvla.runtime.manifest import Manifest, read_manifest

_logger = logging.getLogger(__name__)


@PreTrainedConfig.register_subclass("quantvla")
@dataclass
class QuantVLAConfig(PreTrainedConfig):  # type: ignore[misc]
    """A compiled engine; features are read from its manifest.

    engine: directory that ``quantvla export`` wrote; threads: per stage, None for one per core;
    seed: of the noise; rename_map: the environment's or robot's observation key -> the engine's.
    """

    engine: str | None = None
    threads: int | None = None
    seed: int = 0
    rename_map: dict[str, str] = field(default_factory=dict)
    device: str | None = "cpu"
    push_to_hub: bool = False

    def __post_init__(self) -> None:
        if self.device not in (None, "cpu"):
            _logger.warning(
                "--policy.device=%s has no effect: lerobot's tensors stay on the cpu, and the engine "
                "runs where it was compiled for",
                self.device,
            )
        self.device = "cpu"
        super().__post_init__()
        if self.engine is not None:
            manifest = read_manifest(Path(self.engine))
            self.input_features = _input_features(manifest, self.rename_map)
            self.output_features = {
                "action": PolicyFeature(type=FeatureType.ACTION, shape=(manifest.action.dim,))
            }

    def engine_directory(self) -> Path:
        """Return the engine's directory; raises `QuantVLAError` if none was given."""
        if self.engine is None:
            raise explain("--policy.engine", "is missing", remedy="give the directory of an engine")
        return Path(self.engine)

    def validate_features(self) -> None:
        """Nothing to check: the features come from the manifest."""

    @property
    def observation_delta_indices(self) -> list[int] | None:
        return None

    @property
    def action_delta_indices(self) -> list[int] | None:
        return None

    @property
    def reward_delta_indices(self) -> list[int] | None:
        return None

    def get_optimizer_preset(self) -> Any:
        raise no_training()

    def get_scheduler_preset(self) -> Any:
        raise no_training()


def no_training() -> QuantVLAError:
    """Return the error for asking an engine to learn."""
    return explain(
        "policy type 'quantvla'",
        "is a compiled engine and cannot be trained",
        remedy="train the checkpoint it was made from, then export again",
    )


def _input_features(manifest: Manifest, renames: dict[str, str]) -> dict[str, PolicyFeature]:
    """Return the engine's inputs under the names that they have before ``renames``."""
    features = {
        camera.key: PolicyFeature(type=FeatureType.VISUAL, shape=(3, camera.height, camera.width))
        for camera in manifest.cameras
    }
    features[manifest.state.key] = PolicyFeature(
        type=FeatureType.STATE, shape=(manifest.state.dim,)
    )
    for theirs, ours in renames.items():
        if ours not in features:
            raise explain(
                f"--policy.rename_map {theirs!r}",
                f"the engine does not read {ours!r}",
                remedy=nearest(ours, features),
            )
        features[theirs] = features.pop(ours)
    return features
