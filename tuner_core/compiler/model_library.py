"""The TIR functions of a model as one CUDA library: lowered and compiled on several threads. Import it after TVM.

TVM lowers all functions one after the other and hands NVRTC one source. Functions of a model do not depend on each
other, TVM's passes and NVRTC leave Python's lock while they work, and a kernel is found by its name in whatever module
of the library holds it. So each function is lowered for itself, its kernels become a module, and a cubin, of their own:
the same machine code, and equal kernels of two builds (:class:`tuner_core.compiler.cuda_build.CubinCache`) are compiled
once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.target import Target
from tvm.tirx.build import codegen_build, split_host_device_mods

_MOST_THREADS = 16  # each needs some 100 MB of address space, of which a build process has a limited amount


@dataclass(frozen=True)
class _Lowered:
    host: tvm.IRModule
    devices: tuple[tuple[Target, tvm.IRModule], ...]

    def names(self) -> list[str]:
        modules = [self.host, *(mod for _, mod in self.devices)]
        return [var.name_hint for mod in modules for var in mod.functions]


def build_library(functions: tvm.IRModule, target: Target, checked: Callable[[str], bool]) -> Any:
    """Lower and compile scheduled functions with all of TVM's passes.

    Args:
        functions: PrimFuncs with their names as global symbols; of other attributes TVM's own.
        target: A CUDA target.
        checked: Of a function's name, whether it compares its arguments with what it was compiled for. Neither its
            result nor its kernel depends on that, but of a model's host code the comparisons are nine tenths.

    Returns:
        The host's library; it imports the modules with the kernels.

    Raises:
        Exception: Whatever TVM or NVRTC raises.
    """
    host = target.host or Target("llvm")
    bound = target.with_host(host)

    def lowered(mod: tvm.IRModule) -> _Lowered:
        with target, tvm.transform.PassContext(opt_level=3):
            return _lower(mod, bound, all(not checked(var.name_hint) for var in mod.functions))

    def compiled(part: tuple[Target, tvm.IRModule]) -> Any:
        kind, mod = part
        with target:
            return codegen_build(mod, kind)

    parts = _parts(functions)
    with ThreadPoolExecutor(_threads(len(parts)), thread_name_prefix="model") as pool:
        results = list(pool.map(lowered, parts))
        if not _all_differ(name for result in results for name in result.names()):
            results = [lowered(functions)]
        devices = [part for result in results for part in result.devices]
        modules = [pool.submit(compiled, part) for part in devices]
        with target:
            library = codegen_build(_merged([result.host for result in results]), host)
        for module in modules:
            library.import_module(module.result())
    return library


def _lower(mod: tvm.IRModule, bound: Target, without_checks: bool) -> _Lowered:
    """What ``tvm.tirx.build`` does before it generates code."""
    pipeline, finalize_host, finalize_device = tirx.get_default_tir_pipeline(bound)
    mod = pipeline(tirx.transform.BindTarget(bound)(mod))
    if without_checks:
        mod = tirx.transform.SkipAssert()(mod)
    host_mod, device_mods = split_host_device_mods(mod)
    devices = ((kind, finalize_device()(device)) for kind, device in device_mods.items() if device.functions)
    return _Lowered(finalize_host()(host_mod), tuple(devices))


def _parts(functions: tvm.IRModule) -> list[tvm.IRModule]:
    """A module for each function, in the order of their names; one for all when they call each other."""
    calls: list[Any] = []
    for function in functions.functions.values():
        tvm_ffi.structural_walk(function.body, (tvm.ir.GlobalVar, calls.append))
    if calls:
        return [functions]
    ordered = sorted(functions.functions.items(), key=lambda item: str(item[0].name_hint))
    return [tvm.IRModule({var: function}, attrs=functions.attrs) for var, function in ordered]


def _merged(hosts: list[tvm.IRModule]) -> tvm.IRModule:
    return tvm.IRModule({var: f for mod in hosts for var, f in mod.functions.items()}, attrs=hosts[0].attrs)


def _all_differ(names: Iterable[str]) -> bool:
    seen = list(names)
    return len(set(seen)) == len(seen)


def _threads(parts: int) -> int:
    return max(1, min(parts, _MOST_THREADS, len(os.sched_getaffinity(0))))
