"""The CUDA calls that running an engine needs, behind one small interface.

Everything asynchronous takes a stream and is ordered by it. The interface is the boundary at which
tests put a device that runs without a GPU and checks order, sizes and lifetimes.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quantvla.runtime.errors import explain

Bytes = NDArray[np.uint8]


class Device(Protocol):
    """One GPU. Addresses, streams and graphs are opaque integers or handles."""

    def allocate(self, size: int) -> int:
        """Return the address of ``size`` bytes of device memory."""
        ...

    def free(self, address: int) -> None:
        """Give device memory back."""
        ...

    def allocate_pinned(self, size: int) -> Bytes:
        """Return ``size`` bytes of page-locked host memory, (size,) uint8."""
        ...

    def free_pinned(self, host: Bytes) -> None:
        """Give page-locked memory back; the array must not be used afterwards."""
        ...

    def create_stream(self) -> Any:
        """Return a new stream that does not wait for the default one."""
        ...

    def destroy_stream(self, stream: Any) -> None:
        """Destroy a stream that nothing runs on."""
        ...

    def synchronize(self, stream: Any) -> None:
        """Wait for everything put on the stream."""
        ...

    def copy_in(self, address: int, host: Bytes, stream: Any) -> None:
        """Copy ``host``, page-locked, to the device, in stream order."""
        ...

    def copy_out(self, host: Bytes, address: int, stream: Any) -> None:
        """Copy device memory to ``host``, page-locked, in stream order."""
        ...

    def begin_capture(self, stream: Any) -> None:
        """Record what is put on the stream from now on, instead of running it."""
        ...

    def end_capture(self, stream: Any) -> Any:
        """Return what was recorded as a graph that can be launched."""
        ...

    def launch(self, graph: Any, stream: Any) -> None:
        """Run a graph, in stream order."""
        ...

    def destroy_graph(self, graph: Any) -> None:
        """Destroy a graph that nothing runs."""
        ...


class CudaDevice:
    """Device 0 through cuda-python."""

    def __init__(self) -> None:
        self._cuda = cuda_bindings()
        self._pinned: dict[int, Any] = {}
        self._call("cudaSetDevice", 0)

    def allocate(self, size: int) -> int:
        return int(self._call("cudaMalloc", size))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def allocate_pinned(self, size: int) -> Bytes:
        import ctypes

        address = int(self._call("cudaHostAlloc", size, self._cuda.cudaHostAllocDefault))
        host = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        self._pinned[host.ctypes.data] = address
        return host

    def free_pinned(self, host: Bytes) -> None:
        self._call("cudaFreeHost", self._pinned.pop(host.ctypes.data))

    def create_stream(self) -> Any:
        return self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)

    def destroy_stream(self, stream: Any) -> None:
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: Any) -> None:
        self._call("cudaStreamSynchronize", stream)

    def copy_in(self, address: int, host: Bytes, stream: Any) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, host.ctypes.data, host.nbytes, kind, stream)

    def copy_out(self, host: Bytes, address: int, stream: Any) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", host.ctypes.data, address, host.nbytes, kind, stream)

    def begin_capture(self, stream: Any) -> None:
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: Any) -> Any:
        captured = self._call("cudaStreamEndCapture", stream)
        graph = self._call("cudaGraphInstantiate", captured, 0)
        self._call("cudaGraphDestroy", captured)
        return graph

    def launch(self, graph: Any, stream: Any) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        self._call("cudaGraphExecDestroy", graph)

    def _call(self, function: str, *arguments: Any) -> Any:
        """Call CUDA; raises `QuantVLAError` with its own words when it fails."""
        error, *results = getattr(self._cuda, function)(*arguments)
        if int(error) != 0:
            _, text = self._cuda.cudaGetErrorString(error)
            said = text.decode() if isinstance(text, bytes) else text
            raise explain(
                f"CUDA {function}", "failed", got=said,
                remedy="check memory with `quantvla doctor`, and that no other process resets the GPU",
            )  # fmt: skip
        return results[0] if results else None


def cuda_bindings() -> Any:
    """Return cuda-python's runtime bindings, of its new layout or the one before 12.6; raises `QuantVLAError`."""
    for name in ("cuda.bindings.runtime", "cuda.cudart"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise explain(
        "cuda-python", "not installed for this Python",
        remedy="pip install cuda-bindings, the major version of `nvidia-smi` or JetPack (12 or 13)",
    )  # fmt: skip
