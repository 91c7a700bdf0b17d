"""Stages as ONNX Runtime sessions.

Sessions take and give numpy arrays with plain ``run``: measured on graphs with a 7 MB input or
output it is as fast as I/O binding within the noise (inputs are not copied), and on a graph of one
small product it takes 6 us, against 9 us for binding anew and 39 us for OrtValues.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from quantvla.runtime import kernels
from quantvla.runtime.errors import explain
from quantvla.runtime.machine import saturates_u8s8
from quantvla.runtime.manifest import StageSpec, TensorSpec

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}


@dataclass(frozen=True)
class OnnxRuntimeBackend:
    """Runs every stage with one execution provider of ONNX Runtime, and refuses to run with another.

    Without ``fused`` the graph is computed node by node as it stands: extended optimizations of 1.32 fuse
    block-wise int4 weights of graphs for TensorRT wrongly.
    """

    provider: str
    fused: bool = True

    def load(self, path: Path, stage: StageSpec, threads: int) -> OnnxRuntimeSession:
        """Return the session of the stage whose graph is ``path``, or of its graph of own operators.

        Raises `QuantVLAError` if it does not load or fit ``stage``.
        """
        import onnxruntime

        if kernels.graph_file(stage) == stage.native != "":
            path = path.with_name(stage.native)
        elif stage.native:
            warnings.warn(
                f"{path.parent}: integer linears run on {kernels.available().describe()}, slower",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip
        if not path.is_file():
            raise explain(path, "graph is missing", remedy="copy the engine again")
        available = onnxruntime.get_available_providers()
        if self.provider not in available:
            raise explain(
                path,
                f"needs the execution provider {self.provider}",
                got=", ".join(available),
                remedy="install the onnxruntime build that has it",
            )
        options = kernels.session_options()
        if not self.fused:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Threads spin while their stage runs, and stop when it ends: the stages have a pool each,
        # and idle ones must not take the cores from the running one or from the robot's own code.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            session = onnxruntime.InferenceSession(
                str(path), sess_options=options, providers=[self.provider]
            )
        except Exception as error:  # ONNX Runtime's exceptions share no narrower base
            raise explain(
                path,
                "ONNX Runtime cannot load the graph",
                got=" ".join(str(error).split()),
                remedy="copy the engine again, or export it with the versions of this machine",
            ) from error
        used = session.get_providers()[0]
        if used != self.provider:
            raise explain(
                path,
                f"expected the execution provider {self.provider}",
                got=used,
                remedy="install the onnxruntime build that has it",
            )
        _check_tensors(path, "input", session.get_inputs(), stage.inputs)
        _check_tensors(path, "output", session.get_outputs(), stage.outputs)
        return OnnxRuntimeSession(session, stage)

    def versions(self) -> dict[str, str]:
        """Return the version of ONNX Runtime and what runs integer linears; that decides how long they take."""
        import onnxruntime

        found = kernels.available()
        versions = {
            "onnxruntime": onnxruntime.__version__,
            "kernels": f"{found.describe()} {found.version}".strip(),
        }
        if saturates_u8s8():
            versions["u8s8"] = "as u8u8: no VNNI, sums of uint8 by int8 would saturate; slower"
        return versions


class OnnxRuntimeSession:
    """One loaded stage."""

    def __init__(self, session: Any, stage: StageSpec) -> None:
        self._session = session
        self._inputs = [spec.name for spec in stage.inputs]
        self._outputs = [spec.name for spec in stage.outputs]

    def run(self, tensors: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return the outputs by name; ``tensors`` holds at least the inputs."""
        results = self._session.run(self._outputs, {name: tensors[name] for name in self._inputs})
        return dict(zip(self._outputs, results, strict=True))


def _check_tensors(path: Path, kind: str, found: Any, expected: tuple[TensorSpec, ...]) -> None:
    """Raise `QuantVLAError` unless a graph's tensors are those of the manifest: name, dtype, shape."""
    in_graph = {t.name: (_DTYPES.get(t.type, t.type), tuple(t.shape)) for t in found}
    in_manifest = {t.name: (t.dtype, t.shape) for t in expected}
    for name in sorted(in_graph.keys() | in_manifest.keys()):
        if in_graph.get(name) == in_manifest.get(name):
            continue
        raise explain(
            path,
            f"{kind} {name!r} of the graph differs from the manifest, "
            f"expected {_describe(in_manifest.get(name))}",
            got=_describe(in_graph.get(name)),
            remedy="export the engine again",
        )


def _describe(tensor: tuple[str, tuple[object, ...]] | None) -> str:
    return "none" if tensor is None else f"{tensor[0]} {list(tensor[1])}"
