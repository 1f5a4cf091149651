"""CUDA builds that end in machine code, on hosts with or without a GPU.

TVM hands each module's generated source to the global function ``tvm_callback_cuda_compile``. Ours compiles it with
NVRTC to a cubin for the architecture of the target in scope, never the host's, and leaves out the C++ standard library
headers of TVM's preamble unless the source uses them: they cost more to parse than most kernels take to compile.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from tuner_core.compiler import nvrtc
from tuner_core.compiler.cuda_libraries import include_dirs, load_tvm_cuda_runtime
from tuner_core.compiler.cuda_source import rewritten
from tuner_core.errors import TunerError

MAX_STATEMENTS = 3000
"""Candidates with more are not compiled: NVRTC takes 2 to 15 core-seconds for them, 0.3 for one of usual size, and no
fast one had more (benchmarks/NOTES.md)."""
_statement_limit: ContextVar[int] = ContextVar("statement_limit", default=0)
_compiled: ContextVar[list[bytes] | None] = ContextVar("compiled", default=None)
_PREAMBLE = re.compile(r"\A\s*#ifdef __CUDACC_RTC__\n.*?\n#endif\n", re.DOTALL)
_LIGHT_PREAMBLE = """\
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int int64_t;
typedef unsigned long int uint64_t;
#define __asm__ asm
#define __volatile__ volatile
"""
_INFINITY = "#ifndef INFINITY\n#define INFINITY __int_as_float(0x7f800000)\n#endif\n"
# TVM's own options (tvm.support.nvcc), so that a kernel built here is as fast as one that stock TVM builds.
_OPTIONS = (
    "-default-device",
    "--device-int128",
    "--use_fast_math",
    "--ptxas-options=--register-usage-level=10",
    "-D__NV_SILENCE_DEPRECATION_BEGIN=",
    "-D__NV_SILENCE_DEPRECATION_END=",
    "-D__NV_SILENCE_HOST_DEPRECATION_BEGIN=",
    "-D__NV_SILENCE_HOST_DEPRECATION_END=",
    "-U__CUDA_NO_HALF_OPERATORS__",
    "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_BFLOAT16_OPERATORS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-U__CUDA_NO_BFLOAT162_OPERATORS__",
    "-U__CUDA_NO_BFLOAT162_CONVERSIONS__",
)


class SourceTooLargeError(Exception):
    """A kernel would take too long to compile."""


@contextlib.contextmanager
def limited_statements(limit: int = MAX_STATEMENTS) -> Iterator[None]:
    """Refuse to compile sources with more statements than that in the block.

    Args:
        limit: The largest number.
    """
    token = _statement_limit.set(limit)
    try:
        yield
    finally:
        _statement_limit.reset(token)


@contextlib.contextmanager
def collected_cubins() -> Iterator[list[bytes]]:
    """The machine code of what TVM has compiled in the block, in that order: its modules do not give it away."""
    cubins: list[bytes] = []
    token = _compiled.set(cubins)
    try:
        yield cubins
    finally:
        _compiled.reset(token)


def light_source(source: str) -> str | None:
    """The source with TVM's preamble replaced by a few typedefs; None when the rest needs the standard library.

    Args:
        source: CUDA C++ as TVM generates it.
    """
    rest, found = _PREAMBLE.subn("", source)
    if not found or "std::" in rest or "CUtensorMap" in rest:
        return None
    return _LIGHT_PREAMBLE + _INFINITY + rest


class CubinCache:
    """Cubins by the hash of what they were compiled from: in memory, and in a directory that processes share.

    Threads may share one.

    Args:
        directory: Where to keep them; None: memory only. Whoever owns the directory removes it.
        capacity: Cubins kept in memory.
    """

    def __init__(self, directory: Path | None = None, capacity: int = 64) -> None:
        self.directory = directory
        self._capacity = capacity
        self._recent: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    @staticmethod
    def key(source: str, arch: str) -> str:
        """The cache key of a source for an architecture."""
        return hashlib.sha256(f"{arch}\0{source}".encode()).hexdigest()

    def get(self, key: str) -> bytes | None:
        """A cubin that was put before, by this process or another."""
        with self._lock:
            if key in self._recent:
                self._recent.move_to_end(key)
                return self._recent[key]
        if self.directory is None:
            return None
        try:
            return (self.directory / f"{key}.cubin").read_bytes()
        except OSError:
            return None

    def put(self, key: str, cubin: bytes) -> None:
        """Keep a cubin. A full or vanished directory costs only the sharing."""
        with self._lock:
            self._recent[key] = cubin
            while len(self._recent) > self._capacity:
                self._recent.popitem(last=False)
        if self.directory is not None:
            with contextlib.suppress(OSError):
                fd, name = tempfile.mkstemp(dir=self.directory)
                with os.fdopen(fd, "wb") as file:
                    file.write(cubin)
                Path(name).replace(self.directory / f"{key}.cubin")


_cache = CubinCache()


def nvrtc_options(arch: str) -> list[str]:
    """What NVRTC is told for an architecture."""
    return [f"--gpu-architecture={arch}", *_OPTIONS, *(f"-I{path}" for path in include_dirs())]


def build_cubin(source: str, arch: str, cache: CubinCache | None = None) -> bytes:
    """Compile CUDA source to machine code.

    Args:
        source: CUDA C++ as TVM generates it.
        arch: e.g. ``sm_90``.
        cache: Looked into first and added to.

    Raises:
        CudaCompileError: With the compiler's log.
        TunerError: NVRTC is not installed, or does not know the architecture.
    """
    cache = cache if cache is not None else _cache
    key = cache.key(source, arch)
    if (known := cache.get(key)) is not None:
        return known
    capability = re.fullmatch(r"sm_(\d+)[af]?", arch)
    if capability is None or int(capability[1]) not in _supported_archs():
        archs = ", ".join(f"sm_{number}" for number in _supported_archs())
        raise TunerError(f"NVRTC {'.'.join(map(str, nvrtc.version()))} cannot build for {arch}; it can for {archs}")
    options = nvrtc_options(arch)
    light = light_source(source)
    if light is not None:
        try:
            cubin = nvrtc.compile_cubin(rewritten(light), options)
        except nvrtc.CudaCompileError:
            light = None  # perhaps only for want of the headers: the full source decides, as TVM wrote it
    if light is None:
        full = "#include <cuda/std/cstdint>\n" + _INFINITY + source.replace("#include <cuda.h>", "")
        cubin = nvrtc.compile_cubin(full, options)
    cache.put(key, cubin)
    return cubin


@functools.cache
def _supported_archs() -> tuple[int, ...]:
    return nvrtc.supported_archs()


def _compile_callback(source: str) -> bytes:
    from tvm.target import Target

    target = Target.current(allow_none=True)
    arch = str(target.attrs["arch"]) if target is not None and "arch" in target.attrs else None
    limit, statements = _statement_limit.get(), source.count(";")
    if limit and statements > limit:
        raise SourceTooLargeError(f"its kernel has {statements} statements after unrolling; {limit} are the limit")
    if arch is None:
        raise TunerError("a CUDA build needs a target with an arch in scope: with Target(...): tvm.build(...)")
    cubin = build_cubin(source, arch)
    if (collected := _compiled.get()) is not None:
        collected.append(cubin)
    return cubin


def enable_cuda_builds(cache_dir: Path | None = None) -> bool:
    """Prepare this process to build for CUDA; call it before the first such build. A second call changes nothing.

    Never in a process that runs kernels: where there is no driver, a stub is loaded in its place.

    Args:
        cache_dir: Directory in which build processes share cubins; made when missing.

    Returns:
        Whether the driver's stub is in use.

    Raises:
        TunerError: NVRTC, cudart or a C compiler is missing; says what to install.
    """
    import tvm_ffi

    stub = load_tvm_cuda_runtime(allow_stub=True)
    nvrtc.version()  # fails here, once, rather than in each candidate
    if cache_dir is not None:
        cache_dir.mkdir(parents=True, exist_ok=True)
        _cache.directory = cache_dir
    tvm_ffi.register_global_func("tvm_callback_cuda_compile", _compile_callback, override=True)
    tvm_ffi.register_error("SourceTooLargeError", SourceTooLargeError)  # or it would come out of TVM as a RuntimeError
    return stub
