"""Which engine library runs the stages of a target."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.errors import explain, nearest
from quantvla.runtime.manifest import EulerSampler, StageSpec
from quantvla.runtime.onnxruntime_backend import OnnxRuntimeBackend
from quantvla.runtime.targets import TARGETS
from quantvla.runtime.tensorrt_backend import TensorRTBackend


class Session(Protocol):
    """One loaded stage."""

    def run(self, tensors: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return the stage's outputs by name; ``tensors`` holds at least its inputs."""
        ...


@runtime_checkable
class DeviceSession(Session, Protocol):
    """A loaded stage that holds device memory, and runs the sampler's loop there."""

    def sample(
        self, tensors: Mapping[str, NDArray[Any]], noise: NDArray[np.float32], sampler: EulerSampler
    ) -> NDArray[np.float32]:
        """Return the state after all steps from ``noise``, same shape."""
        ...

    def close(self) -> None:
        """Free the device memory."""
        ...


class Backend(Protocol):
    """An engine library."""

    def load(self, path: Path, stage: StageSpec, threads: int) -> Session:
        """Return the stage in ``path``, ready to run; raises `QuantVLAError` if it differs from ``stage``."""
        ...

    def versions(self) -> dict[str, str]:
        """Return the names and versions of the libraries that run the stages."""
        ...


UNFUSED = "cpu-unfused"
"""Target of a copy of a GPU engine whose numbers are checked without the GPU."""

BACKENDS: Mapping[str, Backend] = {
    "cpu": OnnxRuntimeBackend(provider="CPUExecutionProvider"),
    UNFUSED: OnnxRuntimeBackend(provider="CPUExecutionProvider", fused=False),
    **{name: TensorRTBackend(target.library) for name, target in TARGETS.items()},
}


def backend_for(target: str) -> Backend:
    """Return the backend of ``target``; raises `QuantVLAError` for one this runtime does not know."""
    if target not in BACKENDS:
        raise explain(
            "manifest target",
            "this runtime cannot run it",
            got=repr(target),
            remedy=f"export for another target ({nearest(target, BACKENDS)})",
        )
    return BACKENDS[target]
