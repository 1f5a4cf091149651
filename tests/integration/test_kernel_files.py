"""CUDA candidates that are one kernel are built without host code; all others, and those for a CPU, are libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import kernels
from tests.integration.test_cuda_search import H200
from tests.unit.test_cuda_build import needs_nvrtc, sm_of
from tuner_core.compiler.tvm_setup import load_tvm

pytestmark = needs_nvrtc

SWAPPED = """
@T.prim_func
def main(A: T.Buffer((256,), "float32"), B: T.Buffer((1024,), "float32"), C: T.Buffer((1024,), "float32")):
    T.func_attr({"global_symbol": "main", "tirx.noalias": True})
    for block in T.thread_binding(4, thread="blockIdx.x"):
        for thread in T.thread_binding(256, thread="threadIdx.x"):
            C[block * 256 + thread] = B[block * 256 + thread] * A[thread]
"""
UNUSED = """
@T.prim_func
def main(A: T.Buffer((256,), "float32"), B: T.Buffer((256,), "float32"), C: T.Buffer((256,), "float32")):
    T.func_attr({"global_symbol": "main", "tirx.noalias": True})
    for thread in T.thread_binding(256, thread="threadIdx.x"):
        C[thread] = A[thread]
"""
DYNAMIC = """
@T.prim_func
def main(A: T.Buffer((256,), "float32"), B: T.Buffer((256,), "float32")):
    T.func_attr({"global_symbol": "main", "tirx.noalias": True})
    for block in T.thread_binding(1, thread="blockIdx.x"):
        for thread in T.thread_binding(256, thread="threadIdx.x"):
            staged = T.alloc_buffer((256,), "float32", scope="shared.dyn")
            staged[thread] = A[thread]
            B[thread] = staged[255 - thread]
"""


def scripted(text: str) -> Any:
    load_tvm(intrinsics=True)
    import tvm
    import tvm.script

    return tvm.IRModule({"main": tvm.script.from_source(text.lstrip())})


def target() -> Any:
    load_tvm(intrinsics=True)
    from tvm.target import Target

    from tuner_server.build.compile import prepare_for_target

    found = Target(json.loads(H200))
    prepare_for_target(found)
    return found


def parameters_of_kernel(mod: Any) -> list[str]:
    """Names of the kernel's parameters, which are those of the buffers."""
    from tuner_core.compiler.lowering import lower

    built_for = target()
    with built_for:
        _, devices, _ = lower(mod, built_for)
    ((kernel,),) = (list(functions.functions.values()) for functions in devices.values())
    return [str(parameter.name).removesuffix("_ptr") for parameter in kernel.params]


@pytest.mark.parametrize("text", [SWAPPED, UNUSED])
def test_a_kernels_file_has_its_buffers_in_the_kernels_order(tmp_path: Path, text: str) -> None:
    from tuner_core.compiler.kernel_call import read_kernel
    from tuner_server.build.compile import compile_module

    mod = scripted(text)
    path = compile_module(mod, target(), tmp_path / "built.so")
    call, cubin = read_kernel(path)
    assert path == tmp_path / "built.kernel" and [file.name for file in tmp_path.iterdir()] == ["built.kernel"]
    assert sm_of(cubin) == 90 and call.kernel.encode() in cubin
    assert ["ABC"[at] for at in call.buffers] == parameters_of_kernel(mod)
    assert set(call.buffers) == ({0, 1, 2} if text is SWAPPED else {0, 2})
    extents = dict(zip(call.launch_params, call.extents, strict=True))
    assert extents.pop("threadIdx.x") == 256
    assert extents == ({"blockIdx.x": 4} if text is SWAPPED else {})


def test_dynamic_shared_memory_is_a_launch_parameter(tmp_path: Path) -> None:
    from tuner_core.compiler.kernel_call import read_kernel
    from tuner_server.build.compile import compile_module

    call, _ = read_kernel(compile_module(scripted(DYNAMIC), target(), tmp_path / "built.so"))
    assert call.launch_params[-1] == "tirx.use_dyn_shared_memory" and call.extents[-1] == 1024


@pytest.mark.parametrize("name", ["greedy", "hungry"])
def test_two_kernels_and_memory_of_their_own_make_a_library(tmp_path: Path, name: str) -> None:
    assert kernels.build(name, tmp_path) == tmp_path / f"{name}.so"
    assert [file.name for file in tmp_path.iterdir()] == [f"{name}.so"]


def test_for_a_cpu_it_is_a_library(tmp_path: Path) -> None:
    assert kernels.build("good", tmp_path, '{"kind": "llvm"}') == tmp_path / "good.so"


def test_a_worker_refuses_a_broken_file_and_one_of_another_kind(tmp_path: Path) -> None:
    from tuner_server.measure.worker import Worker
    from tuner_server.processes.child import WorkError

    (tmp_path / "a.kernel").write_bytes(b"\x7fELF\n and more")
    (tmp_path / "b.kernel").write_bytes(b'{"kernel": "k"}\n')
    (tmp_path / "c.ll").write_text("define void @main() { ret void }")
    evaluator = {"number": 1, "repeat": 1, "min_repeat_ms": 1}
    worker = Worker("cpu:0")
    for name, said in (
        ("a.kernel", "not a kernel"),
        ("b.kernel", "not a kernel's file"),
        ("c.ll", "shared libraries and kernels"),
    ):
        with pytest.raises(WorkError, match=said) as error:
            worker.measure({"artifact": str(tmp_path / name), "args_info": [], "evaluator": evaluator})
        assert error.value.kind == "run_error"


def test_a_worker_passes_each_parameter_its_buffer_and_then_the_extents(tmp_path: Path) -> None:
    import numpy as np
    import tvm

    from tuner_core.compiler.cuda_libraries import load_tvm_cuda_runtime
    from tuner_core.compiler.kernel_call import read_kernel
    from tuner_server.build.compile import compile_module
    from tuner_server.measure.loaded import load_operator

    load_tvm_cuda_runtime(allow_stub=True)
    path = compile_module(scripted(SWAPPED), target(), tmp_path / "built.so")
    call, _ = read_kernel(path)
    arguments = [tvm.runtime.tensor(np.zeros(size, "float32")) for size in (256, 1024, 1024)]
    passed = load_operator(path)._passed(arguments)
    pointers = [pointer.value for pointer in passed[: len(call.buffers)]]
    assert pointers == [arguments[at].data_ptr() for at in call.buffers]
    assert passed[len(pointers) :] == list(call.extents)
