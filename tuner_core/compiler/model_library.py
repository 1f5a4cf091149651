"""The TIR functions of a model as one CUDA library: lowered and compiled on several threads. Import it after TVM.

TVM lowers all functions one after the other and hands NVRTC one source. Functions of a model do not depend on each
other, TVM's passes and NVRTC leave Python's lock while they work, and a kernel is found by its name in whatever module
of the library holds it. So each function is lowered for itself, and its kernels become a module, and a cubin, of their
own; those that two builds share are compiled once (:class:`tuner_core.compiler.cuda_build.CubinCache`).
"""

from __future__ import annotations

import os
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tvm
import tvm_ffi
from tvm.target import Target
from tvm.tirx.build import codegen_build

from tuner_core.compiler.lowering import lower

_Lowered = tuple[tvm.IRModule, dict[Target, tvm.IRModule], Target]

_MOST_THREADS = 16  # each needs some 100 MB of address space, of which a build process has a limited amount


def build_library(
    functions: tvm.IRModule, target: Target, checked: Container[str] = (), tuned: Container[str] = ()
) -> Any:
    """Lower and compile scheduled functions.

    Args:
        functions: PrimFuncs with their names as global symbols.
        target: A CUDA target.
        checked: Names of the functions that compare their arguments with what they were compiled for. Neither results
            nor kernels depend on that, but of a model's host code the comparisons are nine tenths.
        tuned: Names of the functions that are lowered as candidates are, so that their kernels are those that were
            measured. The others get all of TVM's passes.

    Returns:
        The host's library; it imports the modules with the kernels.

    Raises:
        Exception: Whatever TVM or NVRTC raises.
    """

    def lowered(mod: tvm.IRModule) -> _Lowered:
        names = [str(var.name_hint) for var in mod.functions]
        checks, as_measured = any(name in checked for name in names), any(name in tuned for name in names)
        with target:
            return lower(mod, target, checks=checks, all_passes=not as_measured)

    def compiled(part: tuple[Target, tvm.IRModule]) -> Any:
        kind, mod = part
        with target:
            return codegen_build(mod, kind)

    parts = _parts(functions)
    with ThreadPoolExecutor(_threads(len(parts)), thread_name_prefix="model") as pool:
        results = list(pool.map(lowered, parts))
        if not _all_differ(results):
            results = [lowered(functions)]
        modules = [pool.submit(compiled, part) for _, devices, _ in results for part in devices.items()]
        with target:
            library = codegen_build(_merged([host for host, _, _ in results]), results[0][2])
        for module in modules:
            library.import_module(module.result())
    return library


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


def _all_differ(results: list[_Lowered]) -> bool:
    """Whether no two functions, of host or devices, have the same name."""
    mods = [mod for host, devices, _ in results for mod in (host, *devices.values())]
    names = [var.name_hint for mod in mods for var in mod.functions]
    return len(set(names)) == len(names)


def _threads(parts: int) -> int:
    return max(1, min(parts, _MOST_THREADS, len(os.sched_getaffinity(0))))
