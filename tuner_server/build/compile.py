"""From a scheduled module to a shared library, in this process: lower, generate code, link."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import tvm
from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock
from tvm.target import Target
from tvm.tirx.build import tir_to_runtime

from tuner_core.compiler.lowering import lower
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


def compile_module(mod: tvm.IRModule, target: Target, output: Path) -> None:
    """Build a scheduled module and write its library.

    Args:
        mod: Module with one function, ``main``.
        target: What to build for; passes and code generation see it in scope.
        output: Library to write, ``.so``.

    Raises:
        Exception: Whatever TVM, a device compiler or the linker raises.
    """
    with target:
        mod = RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(mod)
        host_mod, device_mods, host = lower(mod, target)
        library: Any = tir_to_runtime(host_mod, device_mods, host)
    workspace = output.with_suffix(".link")
    workspace.mkdir()
    try:
        if device_mods:
            library.export_library(str(output), fcompile=link_shared, workspace_dir=str(workspace))
        else:
            library.write_to_file(str(workspace / "main.o"))
            link_shared(str(output), [str(workspace / "main.o")])
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
