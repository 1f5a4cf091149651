"""From a scheduled module to what code is generated from."""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm.target import Target
from tvm.tirx.build import split_host_device_mods


def lower(mod: tvm.IRModule, target: Target) -> tuple[tvm.IRModule, dict[Target, tvm.IRModule], Target]:
    """The passes of ``tvm.tirx.build``, minus the checks of arguments and, for CUDA, the elimination of subexpressions.

    Candidates are called with the arguments that their workload states; the checks, with their messages, are a
    third of the machine code of a small kernel and none of its run time. The names that subexpressions get are inlined
    again by the last simplification of device code: the machine code is the same, and a fifth of the lowering is saved.

    Returns:
        Host functions, device functions by target, and the host's target.
    """
    host = target.host or (target if target.kind.name == "llvm" else Target("llvm"))
    mod = tirx.transform.BindTarget(target.with_host(host))(mod)
    pipeline, finalize_host, finalize_device = tirx.get_default_tir_pipeline(target)
    with tvm.transform.PassContext(config={"tirx.disable_cse_tir": target.kind.name == "cuda"}):
        mod = tirx.transform.SkipAssert()(pipeline(mod))
    host_mod, device_mods = split_host_device_mods(mod)
    devices = {device: finalize_device()(device_mod) for device, device_mod in device_mods.items()}
    return finalize_host()(host_mod), devices, Target(host)
