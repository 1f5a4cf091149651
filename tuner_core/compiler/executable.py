"""From a scheduled module to a Relax VM executable on disk that stock TVM loads."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner_core.compiler.cuda_build import enable_cuda_builds
from tuner_core.compiler.tvm_setup import load_tvm
from tuner_core.errors import TunerError

if TYPE_CHECKING:
    from tvm.ir import IRModule
    from tvm.relax import VMExecutable
    from tvm.target import Target


def build_executable(
    mod: IRModule, target: Target, *, tuned: Collection[str] = (), trusted: bool = False
) -> VMExecutable:
    """Lower and compile a module whose TIR functions are scheduled.

    For CUDA this takes all cores that the process may use.

    Args:
        mod: From ``apply_schedules``.
        target: What it will run on; a GPU target without a host gets llvm as its host.
        tuned: Names of the functions that run a record's schedule: for CUDA their kernels are those that were measured.
        trusted: Whoever runs it passes arguments of the right device and layout; without checks of them, a CUDA model
            takes a second less to build. Arguments of functions that only get what the model itself computed, or its
            constants, are never checked there.

    Raises:
        TunerError: Lowering or code generation failed; the text is TVM's last line.
    """
    load_tvm(intrinsics=True)
    if target.kind.name == "cuda":
        enable_cuda_builds()
    import tvm
    from tvm import relax
    from tvm.ir.transform import PassContext

    # the passes of TVM's own pipelines after scheduling; its CPU pipeline cannot be asked for them in this version
    passes = [
        relax.transform.RewriteDataflowReshape(),
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory(),
        relax.transform.RewriteCUDAGraph(),
        relax.transform.LowerAllocTensor(),
        relax.transform.KillAfterLastUse(),
        relax.transform.LowerRuntimeBuiltin(),
        relax.transform.ComputePrimValue(),
        relax.transform.VMShapeLower(),
        relax.transform.AttachGlobalSymbol(),
    ]
    lower = tvm.transform.Sequential(passes)
    try:
        with target, PassContext(opt_level=3):
            if target.kind.name != "cuda":
                return relax.build(mod, target=target, relax_pipeline=lower)
            return _linked(lower(mod), target, frozenset() if trusted else fed_from_outside(mod), tuned)
    except Exception as error:  # TVM's errors have no common base
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise TunerError(f"the model cannot be compiled for {target.kind.name}: {lines[-1][:300]}") from error


def _linked(mod: IRModule, target: Target, checked: Collection[str], tuned: Collection[str]) -> VMExecutable:
    """What ``relax.build`` does after the passes, with a library that is built on several threads."""
    from tvm import relax
    from tvm.relax import vm_build

    from tuner_core.compiler.model_library import build_library

    builder = relax.ExecBuilder()
    functions = vm_build._filter_tir(vm_build._vmcodegen(builder, mod))
    library = None if functions is None else build_library(functions, target, checked, tuned)
    return relax.VMExecutable(vm_build._ffi_api.VMLink(builder, target, library, [], {}))


def fed_from_outside(mod: IRModule) -> frozenset[str]:
    """Names of the TIR functions that get an argument of the model, or a view of one.

    The others get what functions have written, in memory that the model has allocated.

    Args:
        mod: Before its calls are lowered.
    """
    import tvm
    from tvm import relax

    fed: set[str] = set()
    for function in mod.functions.values():
        if not isinstance(function, relax.Function):
            continue
        outside = list(function.params)
        for block in function.body.blocks:
            for binding in block.bindings:
                value = binding.value
                if not isinstance(binding, relax.VarBinding) or isinstance(value, relax.If | relax.Function):
                    return _tir_functions(mod)
                used: list[Any] = []
                relax.analysis.post_order_visit(value, used.append)
                if not any(node.same_as(variable) for node in used for variable in outside):
                    continue
                fed.update(node.name_hint for node in used if isinstance(node, tvm.ir.GlobalVar))
                if not (isinstance(value, relax.Call) and value.op.same_as(tvm.ir.Op.get("relax.call_tir"))):
                    outside.append(binding.var)  # a view, a tuple
    return frozenset(fed)


def _tir_functions(mod: IRModule) -> frozenset[str]:
    import tvm

    return frozenset(var.name_hint for var, f in mod.functions.items() if isinstance(f, tvm.tirx.PrimFunc))


def export_executable(executable: VMExecutable, path: str | Path) -> Path:
    """Write an executable as a shared library.

    It loads with stock TVM: ``relax.VirtualMachine(tvm.runtime.load_module(PATH), device)``.

    Args:
        executable: From :func:`build_executable`.
        path: Where to; ends in ``.so`` (``.tar`` holds objects that the loader links).

    Returns:
        The path.

    Raises:
        TunerError: The file cannot be written.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise TunerError(f"cannot write {path}: {path.parent} is not a directory")
    try:
        executable.export_library(str(path))
    except Exception as error:  # OSError, or whatever the linker says
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise TunerError(f"cannot write {path}: {lines[-1][:300]}") from None
    return path
