"""A built operator in a worker: a library with host code, or a kernel that the worker launches itself."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import tvm_ffi

from tuner_core.compiler.kernel_call import SUFFIX, KernelCall, read_kernel

_ENTRY = "main"


class Operator(Protocol):
    """What can be run and timed."""

    def __call__(self, *arguments: Any) -> None:
        """Run once; on a GPU it may still run when this returns."""

    def times(self, arguments: Sequence[Any], device: Any, number: int, repeat: int) -> list[float]:
        """Seconds for each call, in ``repeat`` samples of ``number`` calls in a row."""


def load_operator(path: Path) -> Operator:
    """Load what a build has left.

    Raises:
        Exception: What TVM or the system says of a file that is none.
    """
    if path.suffix == SUFFIX:
        return _Kernel(*read_kernel(path))
    return _Library(load_library(path))


def load_library(path: Path) -> Any:
    """Load a shared library as a module that is unmapped when nobody holds it any more.

    ``tvm.runtime.load_module`` keeps every library mapped for good: 20 KB and five mappings a trial.

    Raises:
        ValueError: It is no shared library by its name; TVM would compile some other files.
    """
    if path.suffix != ".so":
        raise ValueError(f"a worker loads shared libraries and kernels only, not {path.name}")
    return tvm_ffi.load_module(str(path), keep_module_alive=False)


class _Library:
    def __init__(self, module: Any) -> None:
        self._module = module

    def __call__(self, *arguments: Any) -> None:
        self._module[_ENTRY](*arguments)

    def times(self, arguments: Sequence[Any], device: Any, number: int, repeat: int) -> list[float]:
        timer = self._module.time_evaluator(_ENTRY, device, number=number, repeat=repeat, min_repeat_ms=0)
        return list(timer(*arguments).results)


@tvm_ffi.register_object("runtime.FunctionInfo")
class _FunctionInfo(tvm_ffi.Object):
    """What TVM's CUDA runtime wants to know of a kernel; TVM has no Python class for it."""


class _Kernel:
    """Launched through TVM's CUDA runtime, like host code that TVM generates does it."""

    def __init__(self, call: KernelCall, cubin: bytes) -> None:
        info = _FunctionInfo(call.kernel, [tvm_ffi.dtype("handle")] * len(call.buffers), call.launch_params, [])
        create = tvm_ffi.get_global_func("ffi.Module.create.cuda")
        self._call = call
        self._module = create(cubin, "cubin", {call.kernel: info}, {})

    def __call__(self, *arguments: Any) -> None:
        self._module[self._call.kernel](*self._passed(arguments))

    def times(self, arguments: Sequence[Any], device: Any, number: int, repeat: int) -> list[float]:
        timer = self._module.time_evaluator(self._call.kernel, device, number=number, repeat=repeat, min_repeat_ms=0)
        return list(timer(*self._passed(arguments)).results)

    def _passed(self, arguments: Sequence[Any]) -> list[Any]:
        pointers = [ctypes.c_void_p(arguments[at].data_ptr()) for at in self._call.buffers]
        return [*pointers, *self._call.extents]
