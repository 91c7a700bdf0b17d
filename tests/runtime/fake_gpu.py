"""A device without a GPU: memory that is checked, streams that run late, graphs that replay.

What is put on a stream runs only when the stream is synchronized, as on a slow GPU; so a missing
synchronization, memory freed too early, a copy of the wrong size or an address that was never
allocated shows up as a failure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from quantvla.runtime.gpu import Gpu
from quantvla.runtime.manifest import Manifest, StageSpec, TensorSpec
from quantvla.runtime.tensorrt_library import Library

GPU = Gpu("Fake Ada", 89, 24 << 30, "13.0")
_TRT_TYPES = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64", "bool": "BOOL"}


class FakeDevice:
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.memory: dict[int, np.ndarray] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.capturing: list[Callable[[], None]] | None = None
        self._next = 1 << 20

    def _name(self) -> int:
        self._next += 1 << 20
        return self._next

    def allocate(self, size: int) -> int:
        assert size > 0
        self.calls.append("allocate")
        address = self._name()
        self.memory[address] = np.full(size, 0xAB, np.uint8)
        return address

    def free(self, address: int) -> None:
        assert not any(self.streams.values()), "freed while work is waiting"
        self.calls.append("free")
        del self.memory[address]

    def allocate_pinned(self, size: int) -> np.ndarray:
        self.calls.append("allocate_pinned")
        host = np.full(size, 0xCD, np.uint8)
        self.pinned[host.ctypes.data] = host
        return host

    def free_pinned(self, host: np.ndarray) -> None:
        assert not any(self.streams.values()), "freed while work is waiting"
        self.calls.append("free_pinned")
        del self.pinned[host.ctypes.data]

    def create_stream(self) -> int:
        self.calls.append("create_stream")
        stream = self._name()
        self.streams[stream] = []
        return stream

    def destroy_stream(self, stream: int) -> None:
        assert not self.streams[stream], "destroyed while work is waiting"
        self.calls.append("destroy_stream")
        del self.streams[stream]

    def synchronize(self, stream: int) -> None:
        assert self.capturing is None, "synchronized while capturing"
        self.calls.append("synchronize")
        queue, self.streams[stream] = self.streams[stream], []
        for work in queue:
            work()

    def put(self, stream: int, name: str, work: Callable[[], None]) -> None:
        self.calls.append(name)
        (self.streams[stream] if self.capturing is None else self.capturing).append(work)

    def view(self, address: int, size: int) -> np.ndarray:
        """The ``size`` bytes at ``address``, which must lie in one living allocation."""
        for start, memory in self.memory.items():
            if start <= address and address + size <= start + memory.nbytes:
                return memory[address - start : address - start + size]
        raise AssertionError(f"{address:#x} + {size} is not allocated")

    def copy_in(self, address: int, host: np.ndarray, stream: int) -> None:
        assert host.ctypes.data in self.pinned, "copied from memory that is not page-locked"
        self.view(address, host.nbytes)

        def work() -> None:
            self.view(address, host.nbytes)[:] = host

        self.put(stream, "copy_in", work)

    def copy_out(self, host: np.ndarray, address: int, stream: int) -> None:
        assert host.ctypes.data in self.pinned, "copied to memory that is not page-locked"

        def work() -> None:
            host[:] = self.view(address, host.nbytes)

        self.put(stream, "copy_out", work)

    def begin_capture(self, stream: int) -> None:
        self.calls.append("begin_capture")
        self.capturing = []

    def end_capture(self, stream: int) -> int:
        self.calls.append("end_capture")
        graph = self._name()
        assert self.capturing is not None
        self.graphs[graph], self.capturing = self.capturing, None
        return graph

    def launch(self, graph: int, stream: int) -> None:
        def work() -> None:
            for step in self.graphs[graph]:
                step()

        self.put(stream, "launch", work)

    def destroy_graph(self, graph: int) -> None:
        self.calls.append("destroy_graph")
        del self.graphs[graph]

    @property
    def leaked(self) -> int:
        return len(self.memory) + len(self.pinned) + len(self.streams) + len(self.graphs)


@dataclass
class FakeContext:
    """Runs ``compute`` (arrays by name -> arrays by name) on the device's memory."""

    device: FakeDevice
    stage: StageSpec
    compute: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
    addresses: dict[str, int] = field(default_factory=dict)

    def set_tensor_address(self, name: str, address: int) -> None:
        assert address % 256 == 0, "TensorRT wants aligned addresses"
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        bound = dict(self.addresses)  # an enqueued run keeps the addresses it was enqueued with

        def work() -> None:
            inputs = {s.name: self._at(bound, s).copy() for s in self.stage.inputs}
            outputs = self.compute(inputs)
            for spec in self.stage.outputs:
                self._at(bound, spec)[...] = outputs[spec.name]

        self.device.put(stream, "execute", work)
        return True

    def _at(self, bound: dict[str, int], spec: TensorSpec) -> np.ndarray:
        size = int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize
        return self.device.view(bound[spec.name], size).view(spec.dtype).reshape(spec.shape)


class FakeEngine:
    def __init__(self, device: FakeDevice, stage: StageSpec, compute: Any) -> None:
        self._device, self._stage, self._compute = device, stage, compute
        self._specs = (*stage.inputs, *stage.outputs)
        self.num_io_tensors = len(self._specs)

    def get_tensor_name(self, index: int) -> str:
        return self._specs[index].name

    def _spec(self, name: str) -> TensorSpec:
        return next(spec for spec in self._specs if spec.name == name)

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=_TRT_TYPES[self._spec(name).dtype])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._spec(name).shape

    def create_execution_context(self) -> FakeContext:
        return FakeContext(self._device, self._stage, self._compute)


def fake_library(device: FakeDevice, manifest: Manifest, compute: dict[str, Any]) -> Library:
    """A TensorRT whose plans are the names of stages."""
    stages = {stage.name.encode(): stage for stage in manifest.stages}

    def deserialize(plan: bytes) -> FakeEngine | None:
        stage = stages.get(plan)
        return FakeEngine(device, stage, compute[stage.name]) if stage else None

    class ILogger:
        pass

    trt = SimpleNamespace(
        ILogger=ILogger,
        Runtime=lambda _logger: SimpleNamespace(deserialize_cuda_engine=deserialize),
    )
    return Library("tensorrt_rtx", "1.7.0", trt)
