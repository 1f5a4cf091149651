"""What a CUDA error means for the process that got it."""

from __future__ import annotations

import re

# Errors that leave the context usable (https://docs.nvidia.com/cuda/cuda-driver-api/, CUresult). After any other one a
# context is taken to be lost: an error too many restarts a worker, an error too few lets a poisoned one measure on.
_HARMLESS = re.compile(
    r"""CUDA_ERROR_(INVALID_VALUE|INVALID_IMAGE|INVALID_SOURCE|INVALID_PTX|UNSUPPORTED_PTX_VERSION|NO_BINARY_FOR_GPU
        |NOT_FOUND|LAUNCH_OUT_OF_RESOURCES|INVALID_HANDLE|NOT_SUPPORTED|OUT_OF_MEMORY)\b
    |cudaError(InvalidValue|InvalidConfiguration|InvalidKernelImage|NoKernelImageForDevice|SymbolNotFound
        |LaunchOutOfResources|MemoryAllocation|NotSupported|InvalidDeviceFunction)\b
    |invalid\ argument|invalid\ configuration|too\ many\ resources|no\ kernel\ image|named\ symbol\ not\ found
    |invalid\ device\ function|out\ of\ memory""",
    re.VERBOSE | re.IGNORECASE,
)
_CUDA = re.compile(r"\bcuda|\bcu[A-Z]\w+\(|CUDA_ERROR", re.IGNORECASE)


def context_lost(text: str) -> bool:
    """Whether a process that got this error can do no more on the device and must be restarted.

    Args:
        text: The whole text of the exception that TVM raised.
    """
    return _CUDA.search(text) is not None and _HARMLESS.search(text) is None


def headline(text: str) -> str:
    """The line of a CUDA error that names it: TVM appends grid, block and source to a launch error.

    Args:
        text: The whole text of the exception.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if _CUDA.search(line)]
    return (named or lines or [""])[-1 if not named else 0]
