"""Less work per chunk: what the last chunk computed from the same pictures and inputs is taken again.

Off unless asked for. The tokens of a camera whose picture has not changed are those of the picture
they were computed from: pictures are compared with that one and not with the last, so that slow drift
cannot add up. Where a picture may change a little, the chunk differs from that of the whole
computation; with a threshold of 0, and for the prefix always, it is the same to the bit.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.errors import explain
from quantvla.runtime.manifest import Manifest, StageSpec
from quantvla.runtime.observation import read_image
from quantvla.runtime.preprocess import Observation
from quantvla.runtime.processing_steps import Images
from quantvla.runtime.rows import Run, Tensors, calls, joined, run_all

Threshold = Annotated[float, msgspec.Meta(ge=0, le=255)]


class ReuseSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may be reused.

    ``cameras``: the mean absolute difference of the raw picture's values (0 to 255) up to which a
    camera counts as unchanged; None never does. Without an engine exported with ``--cameras-apart``
    the vision tower runs for all cameras or for none. ``prefix``: the language model's part too,
    when all its inputs are equal.
    """

    cameras: Threshold | None = None
    prefix: bool = False


class ReuseCounts(msgspec.Struct):
    """How many pictures and prefixes chunks needed, and how many of those were there already."""

    images: int = 0
    images_reused: int = 0
    prefixes: int = 0
    prefixes_reused: int = 0


class Reuse:
    """Runs the stages before the sampler, or takes what they gave for the chunk before."""

    def __init__(self, spec: ReuseSpec, manifest: Manifest) -> None:
        """Raise `QuantVLAError` for a threshold that is no difference of pictures."""
        if spec.cameras is not None and not 0 <= spec.cameras <= 255:
            raise explain(
                "reuse cameras",
                "expected a mean difference of 0 to 255",
                got=spec.cameras,
                remedy="0 reuses identical pictures only, 1 to 3 are about a camera's noise",
            )
        self.spec = spec
        self.counts = ReuseCounts()
        self._cameras = {s.output: s.keys for s in manifest.preprocess if isinstance(s, Images)}
        self._now: dict[str, NDArray[np.uint8]] = {}
        self.forget()

    def forget(self) -> None:
        """Compute everything anew next time."""
        self._pictures: dict[str, NDArray[np.uint8]] = {}
        self._inputs: dict[str, dict[str, NDArray[Any]]] = {}
        self._rows: dict[str, list[dict[str, NDArray[Any]]]] = {}

    def see(self, obs: Observation) -> None:
        """Take the pictures that the next `run` is about."""
        keys = [key for keys in self._cameras.values() for key in keys]
        self._now = {key: read_image(obs, key) for key in keys}

    def run(self, stage: StageSpec, tensors: Tensors, run: Run) -> dict[str, NDArray[Any]]:
        """Return the outputs of ``stage``; ``run`` computes them."""
        sees = [self._cameras.get(spec.name) for spec in stage.inputs]
        if len(sees) == 1 and sees[0] is not None:
            return self._vision(stage, sees[0], tensors, run)
        return self._prefix(stage, tensors, run)

    def _vision(
        self, stage: StageSpec, keys: tuple[str, ...], tensors: Tensors, run: Run
    ) -> dict[str, NDArray[Any]]:
        if self.spec.cameras is None:
            return run_all(stage, tensors, run)
        changed = [self._changed(key, self.spec.cameras) for key in keys]
        if stage.repeat == 1:
            changed = [any(changed)]
        rows = self._rows.setdefault(stage.name, [{} for _ in changed])
        per_row = len(keys) // len(changed)
        self.counts.images += len(keys)
        self.counts.images_reused += per_row * changed.count(False)
        for row, call in enumerate(calls(stage, tensors)):
            if changed[row]:
                rows[row] = run(call)
                for key in keys[row * per_row : (row + 1) * per_row]:
                    self._pictures[key] = self._now[key].copy()
        return joined(rows)

    def _changed(self, key: str, threshold: float) -> bool:
        before, now = self._pictures.get(key), self._now[key]
        if before is None or before.shape != now.shape:
            return True
        if threshold == 0:
            return not np.array_equal(before, now)
        difference = np.maximum(before, now)
        difference -= np.minimum(before, now)
        return bool(difference.mean() > threshold)

    def _prefix(self, stage: StageSpec, tensors: Tensors, run: Run) -> dict[str, NDArray[Any]]:
        if not self.spec.prefix:
            return run_all(stage, tensors, run)
        inputs = {spec.name: tensors[spec.name] for spec in stage.inputs}
        before = self._inputs.get(stage.name)
        same = before is not None and all(
            np.array_equal(value, before[name]) for name, value in inputs.items()
        )
        self.counts.prefixes += 1
        self.counts.prefixes_reused += same
        if not same:
            self._rows[stage.name] = [run_all(stage, tensors, run)]
            self._inputs[stage.name] = inputs
        return dict(self._rows[stage.name][0])
