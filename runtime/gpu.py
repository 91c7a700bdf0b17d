"""The NVIDIA GPU of this machine, through the CUDA driver library that every driver installs."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from quantvla.runtime.errors import explain

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@dataclass(frozen=True)
class Gpu:
    """Device 0: name, compute capability (major * 10 + minor), memory, and the driver's CUDA version."""

    name: str
    compute_capability: int
    memory_bytes: int
    cuda: str


def find_gpu() -> Gpu:
    """Return the GPU; raises `QuantVLAError` if there is none, or no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise explain(
            "GPU", "no CUDA driver on this machine", got="libcuda.so.1 not found",
            remedy="run this on the robot, or pass --compute-capability where the library builds without a GPU",
        ) from error  # fmt: skip
    if driver.cuInit(0) != 0:
        raise explain(
            "GPU", "the CUDA driver finds none", remedy="check that the device is enabled"
        )
    device, number = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), 0)
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), device)
    values = []
    for attribute in (_MAJOR, _MINOR):
        driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        values.append(number.value)
    memory = ctypes.c_size_t()
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    driver.cuDriverGetVersion(ctypes.byref(number))
    return Gpu(
        name.value.decode(), values[0] * 10 + values[1], memory.value,
        f"{number.value // 1000}.{number.value % 1000 // 10}",
    )  # fmt: skip
