"""A built operator in a worker: a library with host code, or a kernel that the worker launches itself."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tvm_ffi

from tuner_core.compiler.kernel_call import SUFFIX, KernelCall, read_kernel

_ENTRY = "main"


class Operator:
    """What can be run and timed.

    Args:
        module: TVM's module of it.
        entry: Function in the module.
        passed: What the function is called with for an operator's arguments.
    """

    def __init__(self, module: Any, entry: str, passed: Callable[[Sequence[Any]], Sequence[Any]]) -> None:
        self._module = module
        self._entry = entry
        self._passed = passed

    def __call__(self, *arguments: Any) -> None:
        """Run once; on a GPU it may still run when this returns."""
        self._module[self._entry](*self._passed(arguments))

    def times(self, arguments: Sequence[Any], device: Any, number: int, repeat: int) -> list[float]:
        """Seconds for each call, in ``repeat`` samples of ``number`` calls in a row."""
        timer = self._module.time_evaluator(self._entry, device, number=number, repeat=repeat, min_repeat_ms=0)
        return list(timer(*self._passed(arguments)).results)


def load_operator(path: Path) -> Operator:
    """Load what a build has left.

    Raises:
        Exception: What TVM or the system says of a file that is none.
    """
    if path.suffix != SUFFIX:
        return Operator(load_library(path), _ENTRY, tuple)
    call, cubin = read_kernel(path)
    return Operator(_kernel_module(call, cubin), call.kernel, partial(_pointers_and_extents, call))


def load_library(path: Path) -> Any:
    """Load a shared library as a module that is unmapped when nobody holds it any more.

    ``tvm.runtime.load_module`` keeps every library mapped for good: 20 KB and five mappings a trial.

    Raises:
        ValueError: It is no shared library by its name; TVM would compile some other files.
    """
    if path.suffix != ".so":
        raise ValueError(f"a worker loads shared libraries and kernels only, not {path.name}")
    return tvm_ffi.load_module(str(path), keep_module_alive=False)


@tvm_ffi.register_object("runtime.FunctionInfo")
class _FunctionInfo(tvm_ffi.Object):
    """What TVM's CUDA runtime wants to know of a kernel; TVM has no Python class for it."""


def _kernel_module(call: KernelCall, cubin: bytes) -> Any:
    """TVM's CUDA runtime launches its kernel, as it does for host code that TVM generates."""
    info = _FunctionInfo(call.kernel, [tvm_ffi.dtype("handle")] * len(call.buffers), call.launch_params, [])
    return tvm_ffi.get_global_func("ffi.Module.create.cuda")(cubin, "cubin", {call.kernel: info}, {})


def _pointers_and_extents(call: KernelCall, arguments: Sequence[Any]) -> list[Any]:
    return [*(ctypes.c_void_p(arguments[at].data_ptr()) for at in call.buffers), *call.extents]
