"""Ask the driver about one GPU, in a process of its own so that the server never touches CUDA.

Run as ``python -m tuner_server.gpu.probe`` with CUDA_VISIBLE_DEVICES naming the GPU; under MPS with its pipe directory
and percentage in the environment as well. It creates a context, because the share is granted to a context, and prints
one JSON line: the facts, or ``{"error": ...}``. Where the environment limits its memory, it finds out whether that
holds: a limit that is accepted but not kept is an error.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
from typing import Any

# CUdevice_attribute, https://docs.nvidia.com/cuda/cuda-driver-api/
_ATTRIBUTES = {
    "max_threads_per_block": 1,
    "max_shared_memory_per_block": 8,
    "warp_size": 10,
    "registers_per_block": 12,
    "sm_count": 16,
    "l2_cache_bytes": 38,
    "capability_major": 75,
    "capability_minor": 76,
    "max_shared_memory_per_block_optin": 97,
}


_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
_BEYOND_BYTES = 256 << 20


class DriverError(Exception):
    """A driver call failed."""


def read_device() -> dict[str, Any]:
    """Facts on CUDA's device 0.

    Raises:
        DriverError: No driver, no device, or MPS refuses the client.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DriverError(str(error)) from None

    def call(name: str, *arguments: Any) -> None:
        status = getattr(cuda, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            cuda.cuGetErrorName(status, ctypes.byref(text))
            raise DriverError(f"{name}: {(text.value or b'?').decode()} ({status})")

    call("cuInit", 0)
    device = ctypes.c_int()
    call("cuDeviceGet", ctypes.byref(device), 0)
    context = ctypes.c_void_p()
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    try:
        facts: dict[str, Any] = {}
        value = ctypes.c_int()
        for key, attribute in _ATTRIBUTES.items():
            call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
            facts[key] = value.value
        name = ctypes.create_string_buffer(128)
        call("cuDeviceGetName", name, len(name), device)
        memory = ctypes.c_size_t()
        call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        if limit := memory_limit_bytes(os.environ.get("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT", "")):
            call("cuCtxSetCurrent", context)
            _try_limit(cuda, limit)
        return {**facts, "name": name.value.decode(), "memory_bytes": memory.value}
    finally:
        cuda.cuDevicePrimaryCtxRelease_v2(device)


def memory_limit_bytes(setting: str) -> int:
    """Bytes that CUDA_MPS_PINNED_DEVICE_MEM_LIMIT grants on device 0; 0: it does not say.

    Args:
        setting: e.g. ``0=34000M`` or ``0=2G``.
    """
    found = re.search(r"(?:^|,)0=(\d+)([MG])B?(?:,|$)", setting)
    return int(found[1]) << (20 if found[2] == "M" else 30) if found else 0


def _try_limit(cuda: ctypes.CDLL, limit_bytes: int) -> None:
    address = ctypes.c_void_p()
    status = cuda.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(limit_bytes + _BEYOND_BYTES))
    if status == 0:
        cuda.cuMemFree_v2(address)
        raise DriverError(f"MPS does not keep the memory limit of {limit_bytes >> 20} MiB")
    if status != _OUT_OF_MEMORY:
        raise DriverError(f"cuMemAlloc beyond the memory limit: error {status}")


def main() -> int:
    """Print the facts."""
    try:
        answer = read_device()
    except DriverError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
    return 1 if "error" in answer else 0


if __name__ == "__main__":
    sys.exit(main())
