"""From a scheduled module to a Relax VM executable on disk that stock TVM loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tuner_core.compiler.cuda_build import enable_cuda_builds
from tuner_core.compiler.tvm_setup import load_tvm
from tuner_core.errors import TunerError

if TYPE_CHECKING:
    from tvm.ir import IRModule
    from tvm.relax import VMExecutable
    from tvm.target import Target


def build_executable(mod: IRModule, target: Target) -> VMExecutable:
    """Lower and compile a module whose TIR functions are scheduled.

    Args:
        mod: From ``apply_schedules``.
        target: What it will run on; a GPU target without a host gets llvm as its host.

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
            return relax.build(mod, target=target, relax_pipeline=lower)
    except Exception as error:  # TVM's errors have no common base
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise TunerError(f"the model cannot be compiled for {target.kind.name}: {lines[-1][:300]}") from error


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
