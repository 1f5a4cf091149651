"""What is left out of the lowering of candidates makes no difference to the source of a kernel."""

from __future__ import annotations

import json
from typing import Any

from tests.integration.test_cuda_search import H200, matmul
from tests.unit.test_cuda_build import needs_nvrtc
from tuner_core.compiler.guard import load_workload


def source_of(device_mods: Any) -> str:
    """CUDA source of some device functions."""
    import tvm_ffi
    from tvm.tirx.build import codegen_build

    from tuner_core.compiler import cuda_build

    cuda_build.enable_cuda_builds()
    seen = []

    def note(source: str) -> bytes:
        seen.append(source)
        return b"\x7fELF"

    tvm_ffi.register_global_func("tvm_callback_cuda_compile", note, override=True)
    try:
        for target, mod in device_mods.items():
            codegen_build(mod, target)
    finally:
        tvm_ffi.register_global_func("tvm_callback_cuda_compile", cuda_build._compile_callback, override=True)
    (source,) = seen
    return source


@needs_nvrtc
def test_the_source_is_that_of_all_of_tvms_passes() -> None:
    workload = matmul("float32")
    import tvm
    from tvm import tirx
    from tvm.target import Target
    from tvm.tirx.build import split_host_device_mods

    from tuner_core.compiler.fallback import fallback_schedule
    from tuner_core.compiler.lowering import lower

    target = Target(json.loads(H200))
    ran = []

    @tvm.ir.instrument.pass_instrument
    class Note:
        def run_before_pass(self, _mod: Any, info: Any) -> None:
            ran.append(info.name)

    with target:
        mod = fallback_schedule(load_workload(workload.body), target).mod
        _, devices, _ = lower(mod, target)
        bound = tirx.transform.BindTarget(target.with_host(Target("llvm")))(mod)
        pipeline, _, finalize_device = tirx.get_default_tir_pipeline(target)
        with tvm.transform.PassContext(config={"tirx.disable_cse_tir": True}, instruments=[Note()]):
            _, full = split_host_device_mods(pipeline(bound))
        full = {kind: finalize_device()(device_mod) for kind, device_mod in full.items()}
    assert source_of(devices) == source_of(full)
    assert {"tirx.RemoveNoOp", "tirx.StmtSimplify"} <= set(ran)  # names of passes as the lowering knows them
