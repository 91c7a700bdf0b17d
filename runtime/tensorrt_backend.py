"""Stages as TensorRT execution contexts.

One stream for an engine; page-locked staging memory; buffers allocated once, at load. The denoise loop
runs on the device: its graph also computes the sampler's next state, the two states alternate between
two buffers, and all steps are captured into one CUDA graph at the second chunk (TensorRT must have run
once before its work can be captured).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.cuda_device import Bytes, CudaDevice, Device
from quantvla.runtime.errors import explain
from quantvla.runtime.gpu import Gpu, find_gpu
from quantvla.runtime.manifest import EulerSampler, StageSpec, TensorSpec, read_manifest
from quantvla.runtime.tensorrt_library import BuildMessages, Library, load_library, make_logger
from quantvla.runtime.tensorrt_plans import Machine, find_machine, require_plan, source_sha256

_ALIGNMENT = 256  # of every address TensorRT takes
_DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "BOOL": "bool",
}  # fmt: skip


@dataclass(frozen=True)
class TensorRTBackend:
    """Runs plans that `quantvla build` made, with the library called ``library`` on device 0."""

    library: str
    make_device: Callable[[], Device] = CudaDevice
    gpu: Callable[[], Gpu] = find_gpu
    load_library: Callable[[str], Library] = load_library

    def load(self, path: Path, stage: StageSpec, threads: int) -> TensorRTSession:
        """Return a stage ready to run; raises `QuantVLAError` with the command that builds a plan for it."""
        engine, library, gpu = path.parent, self.load_library(self.library), self.gpu()
        here = Machine(library.name, library.version, gpu.compute_capability, gpu.name)
        manifest = read_manifest(engine)
        source = source_sha256(engine, manifest.files, stage.file)
        plan = require_plan(engine, find_machine(engine, here), stage.name, source)
        messages = BuildMessages()
        logger = make_logger(library, messages)
        runtime = library.trt.Runtime(logger)
        loaded = runtime.deserialize_cuda_engine(plan.read_bytes())
        if loaded is None:
            raise explain(
                plan, f"{library.name} {library.version} cannot load it",
                got=" ".join((messages.errors or ["no message"])[0].split()),
                remedy=f"run: quantvla build {engine}",
            )  # fmt: skip
        _check_tensors(plan, loaded, stage)
        return TensorRTSession(self.make_device(), loaded, stage, keep=(runtime, logger))

    def versions(self) -> dict[str, str]:
        """Return the version of the library, and the GPU."""
        library, gpu = self.load_library(self.library), self.gpu()
        return {library.name: library.version, "cuda": gpu.cuda, "gpu": gpu.name}


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the stage: its device memory, and page-locked memory of the same size."""

    spec: TensorSpec
    address: int
    host: Bytes

    def write(self, value: NDArray[Any]) -> None:
        array = np.ascontiguousarray(value, dtype=self.spec.dtype)
        if array.shape != self.spec.shape:
            raise explain(
                f"tensor {self.spec.name}", f"expected shape {self.spec.shape}", got=array.shape,
                remedy="export the engine again",
            )  # fmt: skip
        self.host[:] = array.reshape(-1).view(np.uint8)

    def read(self) -> NDArray[Any]:
        return self.host.view(self.spec.dtype).reshape(self.spec.shape).copy()


class TensorRTSession:
    """One loaded stage with all memory it needs. Not for several threads."""

    def __init__(
        self, device: Device, engine: Any, stage: StageSpec, keep: tuple[Any, ...] = ()
    ) -> None:
        self._device, self._stage = device, stage
        self._stream = device.create_stream()
        self._tensors = {
            spec.name: self._allocate(spec) for spec in (*stage.inputs, *stage.outputs)
        }
        self._engine, self._keep = engine, keep  # the context needs them alive
        self._context = engine.create_execution_context()
        self._loop: _Loop | None = None
        self._bind()

    def run(self, tensors: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return the outputs by name; ``tensors`` holds at least the inputs."""
        self._bind()
        self._send(tensors, [spec.name for spec in self._stage.inputs])
        self._execute()
        for spec in self._stage.outputs:
            tensor = self._tensors[spec.name]
            self._device.copy_out(tensor.host, tensor.address, self._stream)
        self._device.synchronize(self._stream)
        return {spec.name: self._tensors[spec.name].read() for spec in self._stage.outputs}

    def sample(
        self, tensors: Mapping[str, NDArray[Any]], noise: NDArray[np.float32], sampler: EulerSampler
    ) -> NDArray[np.float32]:
        """Integrate from ``noise`` on the device; returns the last state, shape of ``noise``."""
        if self._loop is None:
            self._loop = _Loop(self._device, self._stream, self._tensors, sampler)
        loop = self._loop
        context = [
            spec.name
            for spec in self._stage.inputs
            if spec.name not in (sampler.state, sampler.time)
        ]
        self._send({**tensors, sampler.state: noise}, [*context, sampler.state])
        loop.run(self._context, self._execute)
        last = loop.last
        self._device.copy_out(last.host, last.address, self._stream)
        self._device.synchronize(self._stream)
        return last.read()

    def close(self) -> None:
        """Wait for the device, then free everything in reverse order. Closing twice is fine."""
        if self._context is None:
            return
        self._device.synchronize(self._stream)
        if self._loop is not None:
            self._loop.close()
        self._context = self._engine = None
        self._keep = ()
        for tensor in reversed(list(self._tensors.values())):
            self._device.free_pinned(tensor.host)
            self._device.free(tensor.address)
        self._tensors = {}
        self._device.destroy_stream(self._stream)

    def _allocate(self, spec: TensorSpec) -> _Tensor:
        size = int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize
        return _Tensor(spec, self._device.allocate(size), self._device.allocate_pinned(size))

    def _bind(self) -> None:
        for name, tensor in self._tensors.items():
            self._context.set_tensor_address(name, tensor.address)

    def _send(self, tensors: Mapping[str, NDArray[Any]], names: list[str]) -> None:
        for name in names:
            tensor = self._tensors[name]
            tensor.write(tensors[name])
            self._device.copy_in(tensor.address, tensor.host, self._stream)

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._stream_handle()):
            raise explain(
                f"stage {self._stage.name}", "TensorRT could not start it",
                remedy="check free memory with `quantvla doctor`",
            )  # fmt: skip

    def _stream_handle(self) -> int:
        return int(self._stream)


class _Loop:
    """All steps of the sampler: addresses per step, run directly once and as one CUDA graph afterwards."""

    def __init__(
        self, device: Device, stream: Any, tensors: Mapping[str, _Tensor], sampler: EulerSampler
    ) -> None:
        self._device, self._stream, self._sampler = device, stream, sampler
        self._next = f"{sampler.state}_next"
        self._states = (tensors[sampler.state], tensors[self._next])
        steps = len(sampler.timesteps)
        self._times = device.allocate(_ALIGNMENT * steps)
        self._host = device.allocate_pinned(_ALIGNMENT * steps)
        self._host[:] = 0
        self._host.view(np.float32)[:: _ALIGNMENT // 4] = sampler.timesteps
        device.copy_in(self._times, self._host, stream)
        self._graph: Any = None
        self._warm = False

    @property
    def last(self) -> _Tensor:
        """The tensor that holds the state after the last step."""
        return self._states[len(self._sampler.timesteps) % 2]

    def run(self, context: Any, execute: Callable[[], None]) -> None:
        """Put all steps on the stream; the first state is in place."""
        if self._graph is not None:
            self._device.launch(self._graph, self._stream)
            return
        if self._warm:
            self._device.begin_capture(self._stream)
            self._steps(context, execute)
            self._graph = self._device.end_capture(self._stream)
            self._device.launch(self._graph, self._stream)
            return
        self._steps(context, execute)
        self._warm = True

    def close(self) -> None:
        """Free the graph and the times."""
        if self._graph is not None:
            self._device.destroy_graph(self._graph)
        self._device.free_pinned(self._host)
        self._device.free(self._times)

    def _steps(self, context: Any, execute: Callable[[], None]) -> None:
        for step in range(len(self._sampler.timesteps)):
            source, target = self._states[step % 2], self._states[(step + 1) % 2]
            context.set_tensor_address(self._sampler.time, self._times + _ALIGNMENT * step)
            context.set_tensor_address(self._sampler.state, source.address)
            context.set_tensor_address(self._next, target.address)
            execute()


def _check_tensors(plan: Path, engine: Any, stage: StageSpec) -> None:
    """Raise `QuantVLAError` unless the plan's tensors are the manifest's: name, type, shape."""
    found = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        kind = engine.get_tensor_dtype(name).name
        found[name] = (_DTYPES.get(kind, kind), tuple(engine.get_tensor_shape(name)))
    expected = {s.name: (s.dtype, s.shape) for s in (*stage.inputs, *stage.outputs)}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise explain(
                plan, f"tensor {name!r} differs from the manifest, expected {expected.get(name)}",
                got=found.get(name), remedy=f"run: quantvla build {plan.parent.parent.parent}",
            )  # fmt: skip
