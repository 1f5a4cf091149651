"""From scheduled functions to what code is generated from. Import it once TVM is loaded."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx
from tvm.ir.instrument import pass_instrument
from tvm.target import Target
from tvm.tirx.build import split_host_device_mods


@pass_instrument
class _WithoutPassesThatAreRepeated:
    """Skips the first of two simplifications of unrolled code, and the removal of statements without effect after it.

    The second one, in the passes of the device's side, finds the same: of 120 candidates 118 had the same source
    without the first, and the others an index or a bound of equal value written in another way.
    """

    def __init__(self) -> None:
        self._simplified = False

    def should_run(self, _mod: tvm.IRModule, info: Any) -> bool:
        if info.name == "tirx.RemoveNoOp":
            return False
        if info.name == "tirx.StmtSimplify" and not self._simplified:
            self._simplified = True
            return False
        return True


def lower(
    mod: tvm.IRModule, target: Target, *, checks: bool = False, all_passes: bool = False
) -> tuple[tvm.IRModule, dict[Target, tvm.IRModule], Target]:
    """The passes of ``tvm.tirx.build``, minus the checks of arguments and, for CUDA, passes that later ones repeat.

    Candidates are called with the arguments that their workload states; the checks, with their messages, are a
    third of the machine code of a small kernel and none of its run time. The names that subexpressions get are inlined
    again by the last simplification of device code, which also repeats an earlier one: a fifth to two fifths are saved.

    Args:
        mod: Scheduled functions.
        target: What to build for.
        checks: Compare arguments with what the functions are compiled for.
        all_passes: Leave none out. One in a hundred candidates for CUDA cannot be lowered then: a pass between them
            does not know the names of vectors.

    Returns:
        Host functions, device functions by target, and the host's target.
    """
    host = target.host or (target if target.kind.name == "llvm" else Target("llvm"))
    mod = tirx.transform.BindTarget(target.with_host(host))(mod)
    pipeline, finalize_host, finalize_device = tirx.get_default_tir_pipeline(target)
    fewer = target.kind.name == "cuda" and not all_passes
    instruments = [_WithoutPassesThatAreRepeated()] if fewer else []
    with tvm.transform.PassContext(config={"tirx.disable_cse_tir": fewer}, instruments=instruments):
        mod = pipeline(mod)
        if not checks:
            mod = tirx.transform.SkipAssert()(mod)
    host_mod, device_mods = split_host_device_mods(mod)
    devices = {device: finalize_device()(device_mod) for device, device_mod in device_mods.items()}
    return finalize_host()(host_mod), devices, Target(host)
