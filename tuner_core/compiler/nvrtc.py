"""NVIDIA's run-time compiler through ctypes: CUDA C++ source in, cubin out. Needs no GPU and no driver.

Protocol: https://docs.nvidia.com/cuda/nvrtc/ (create, compile, get the cubin, destroy).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

from tuner_core.compiler.cuda_libraries import open_nvrtc


class CudaCompileError(Exception):
    """NVRTC refused a source. The text is its log."""


@functools.cache
def _library() -> ctypes.CDLL:
    library = open_nvrtc()
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def _check(status: int, what: str) -> None:
    if status:
        text = _library().nvrtcGetErrorString(status)
        raise CudaCompileError(f"{what}: {text.decode()}")


def version() -> tuple[int, int]:
    """NVRTC's CUDA version, e.g. (13, 0)."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
    return major.value, minor.value


def supported_archs() -> tuple[int, ...]:
    """Compute capabilities that this NVRTC builds for, times ten: 75, 80, ..."""
    count = ctypes.c_int()
    _check(_library().nvrtcGetNumSupportedArchs(ctypes.byref(count)), "nvrtcGetNumSupportedArchs")
    archs = (ctypes.c_int * count.value)()
    _check(_library().nvrtcGetSupportedArchs(archs), "nvrtcGetSupportedArchs")
    return tuple(archs)


def _log(program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    if _library().nvrtcGetProgramLogSize(program, ctypes.byref(size)) or size.value <= 1:
        return ""
    text = ctypes.create_string_buffer(size.value)
    _library().nvrtcGetProgramLog(program, text)
    return text.value.decode(errors="replace")


def _headline_last(log: str) -> str:
    """The log, with its first error repeated as the last line: what a one-line report shows."""
    errors = [line.strip() for line in log.splitlines() if "error" in line]
    return "\n".join([log.rstrip(), errors[0] if errors else "NVRTC failed without a message"])


def compile_cubin(source: str, options: Sequence[str], name: str = "kernels.cu") -> bytes:
    """Compile one source.

    Args:
        source: CUDA C++.
        options: NVRTC's options; ``--gpu-architecture=sm_XX`` among them, so that the result is machine code, not PTX.
        name: Shown in messages.

    Raises:
        CudaCompileError: With the compiler's log.
        TunerError: NVRTC is not installed.
    """
    library = _library()
    program = ctypes.c_void_p()
    _check(
        library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None),
        "nvrtcCreateProgram",
    )
    try:
        encoded = [option.encode() for option in options]
        argv = (ctypes.c_char_p * len(encoded))(*encoded)
        if library.nvrtcCompileProgram(program, len(encoded), argv):
            raise CudaCompileError(_headline_last(_log(program)))
        size = ctypes.c_size_t()
        _check(library.nvrtcGetCUBINSize(program, ctypes.byref(size)), "nvrtcGetCUBINSize")
        cubin = ctypes.create_string_buffer(size.value)
        _check(library.nvrtcGetCUBIN(program, cubin), "nvrtcGetCUBIN")
        return cubin.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
