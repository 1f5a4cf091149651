"""From a scheduled module to what a worker loads, in this process: lower, generate code, link."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import tvm
from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock
from tvm.target import Target
from tvm.tirx.build import codegen_build, tir_to_runtime

from tuner_core.compiler.kernel_call import SUFFIX, KernelCall, write_kernel
from tuner_core.compiler.lowering import lower_parts
from tuner_server.build.link import link_shared


@functools.cache
def prepare_for_kind(kind: str, cubin_cache: Path | None) -> None:
    """Make this process able to generate code for a kind of target; cheap from the second time on.

    Args:
        kind: Kind of the target, e.g. ``llvm`` or ``cuda``.
        cubin_cache: Directory in which build processes share compiled kernels.

    Raises:
        TunerError: What the kind needs is not installed.
    """
    if kind == "cuda":
        from tuner_core.compiler.cuda_build import enable_cuda_builds

        enable_cuda_builds(cubin_cache)


def prepare_for_target(target: Target, cubin_cache: Path | None = None) -> None:
    """:func:`prepare_for_kind` of a target; call it before a build."""
    prepare_for_kind(str(target.kind.name), cubin_cache)


def compile_module(mod: tvm.IRModule, target: Target, output: Path) -> Path:
    """Build a scheduled module: what a measurement worker loads.

    Args:
        mod: Module with one function, ``main``.
        target: What to build for; passes and code generation see it in scope.
        output: Library to write, ``.so``.

    Returns:
        The library; or, beside it, the file of a kernel, where launching that is all a library would do.

    Raises:
        Exception: Whatever TVM, a device compiler or the linker raises.
    """
    with target:
        mod = RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(mod)
        lowered = lower_parts(mod, target)
        if lowered.call is not None:
            return _write_kernel(lowered.call, lowered.devices, output.with_suffix(SUFFIX))
        library: Any = tir_to_runtime(lowered.host_functions(), lowered.devices, lowered.host)
    workspace = output.with_suffix(".link")
    workspace.mkdir()
    try:
        if lowered.devices:
            library.export_library(str(output), fcompile=link_shared, workspace_dir=str(workspace))
        else:
            library.write_to_file(str(workspace / "main.o"))
            link_shared(str(output), [str(workspace / "main.o")])
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    return output


def _write_kernel(call: KernelCall, devices: dict[Target, tvm.IRModule], output: Path) -> Path:
    from tuner_core.compiler.cuda_build import collected_cubins

    ((target, functions),) = devices.items()
    with collected_cubins() as cubins:
        codegen_build(functions, target)
    (cubin,) = cubins
    write_kernel(output, call, cubin)
    return output
