"""Schedules for operators that get no trials: dlight on GPUs, our own on CPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuner_core.compiler.tvm_setup import load_tvm
from tuner_core.errors import TunerError

if TYPE_CHECKING:
    from tvm.ir import IRModule
    from tvm.s_tir import Schedule
    from tvm.target import Target
    from tvm.tirx import PrimFunc


def fallback_schedule(mod: IRModule, target: Target) -> Schedule:
    """A good, safe schedule without any measurement.

    Args:
        mod: A workload's normalised module.
        target: What it will run on.

    Returns:
        A schedule whose trace replays on the same module. On a CPU it may be unscheduled (an empty trace) when nothing
        better is legal.

    Raises:
        TunerError: A GPU for which dlight has no rule for this operator: unscheduled functions cannot run there. One
            that comes with its own threads is left as it is.
    """
    load_tvm(intrinsics=True)
    if is_gpu(target):
        return _dlight(mod, target)
    from tuner_core.compiler.cpu_fallback import schedule_cpu

    return schedule_cpu(mod, target)


def is_gpu(target: Target) -> bool:
    """Whether functions for this target need thread bindings."""
    return "gpu" in target.keys


def _dlight(mod: IRModule, target: Target) -> Schedule:
    from tvm.s_tir import Schedule, dlight

    rules = (
        dlight.gpu.Matmul(),
        dlight.gpu.GEMV(),
        dlight.gpu.Reduction(),
        dlight.gpu.GeneralReduction(),
        dlight.gpu.Fallback(),
    )
    problem = "no rule matches"
    with target:
        for rule in rules:
            try:
                found = rule.apply(mod["main"], target, False)
            except Exception as error:  # a rule that trips over an operator must not hide the next one
                problem = str(error).strip().splitlines()[-1][:200] if str(error).strip() else type(error).__name__
                continue
            if isinstance(found, list):
                found = found[0] if found else None
            if isinstance(found, Schedule):
                return found
    if has_device_code(mod["main"]):
        return Schedule(mod)
    raise TunerError(f"dlight cannot schedule this operator for {target.kind.name}: {problem}")


def has_device_code(function: PrimFunc) -> bool:
    """Whether a function comes with its own threads: TVM writes its sorts and scans for GPUs so, ready to run."""
    import tvm_ffi
    from tvm import tirx

    bound: list[bool] = []
    tvm_ffi.structural_walk(
        function.body,
        [
            (tirx.AttrStmt, lambda attribute: bound.append(attribute.attr_key == "thread_extent")),
            (tirx.For, lambda loop: bound.append(loop.thread_binding is not None)),
        ],
    )
    return any(bound)
