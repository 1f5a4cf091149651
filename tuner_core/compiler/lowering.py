"""From scheduled functions to what code is generated from. Import it once TVM is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import tirx
from tvm.ir.instrument import pass_instrument
from tvm.target import Target
from tvm.tirx.build import split_host_device_mods

from tuner_core.compiler.kernel_call import KernelCall, only_call


@pass_instrument
class _ForCandidates:
    """Skips the first of two simplifications of unrolled code, and the removal of statements without effect after it.

    The second one, in the passes of the device's side, finds the same: of 120 candidates 118 had the same source
    without the first, and the others an index or a bound of equal value written in another way.

    Attributes:
        before_host_code: All functions as they are before those of the host get a calling convention.
    """

    def __init__(self) -> None:
        self.before_host_code: tvm.IRModule | None = None
        self._simplified = False

    def should_run(self, mod: tvm.IRModule, info: Any) -> bool:
        if info.name == "tirx.MakePackedAPI":
            self.before_host_code = mod
        if info.name == "tirx.RemoveNoOp":
            return False
        if info.name == "tirx.StmtSimplify" and not self._simplified:
            self._simplified = True
            return False
        return True


@dataclass(frozen=True)
class Lowered:
    """Device functions, ready for code to be generated, and host functions that are not finished yet.

    Attributes:
        devices: Device functions by target.
        host: The host's target.
        call: What the host functions do, where that is one kernel's launch; not looked for where no pass is left out.
    """

    devices: dict[Target, tvm.IRModule]
    host: Target
    call: KernelCall | None
    _host_mod: tvm.IRModule
    _finalize: Any

    def host_functions(self) -> tvm.IRModule:
        """The host functions, finished."""
        return self._finalize()(self._host_mod)


def lower_parts(mod: tvm.IRModule, target: Target, *, checks: bool = False, all_passes: bool = False) -> Lowered:
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
    """
    host = target.host or (target if target.kind.name == "llvm" else Target("llvm"))
    mod = tirx.transform.BindTarget(target.with_host(host))(mod)
    pipeline, finalize_host, finalize_device = tirx.get_default_tir_pipeline(target)
    fewer = target.kind.name == "cuda" and not all_passes
    instruments = [_ForCandidates()] if fewer else []
    with tvm.transform.PassContext(config={"tirx.disable_cse_tir": fewer}, instruments=instruments):
        mod = pipeline(mod)
        if not checks:
            mod = tirx.transform.SkipAssert()(mod)
    host_mod, device_mods = split_host_device_mods(mod)
    devices = {device: finalize_device()(device_mod) for device, device_mod in device_mods.items()}
    before = next((instrument.before_host_code for instrument in instruments), None)
    return Lowered(devices, Target(host), None if before is None else only_call(before), host_mod, finalize_host)


def lower(
    mod: tvm.IRModule, target: Target, *, checks: bool = False, all_passes: bool = False
) -> tuple[tvm.IRModule, dict[Target, tvm.IRModule], Target]:
    """All of it: see :func:`lower_parts`.

    Returns:
        Host functions, device functions by target, and the host's target.
    """
    lowered = lower_parts(mod, target, checks=checks, all_passes=all_passes)
    return lowered.host_functions(), lowered.devices, lowered.host
