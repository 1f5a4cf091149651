"""Search and build for a GPU on a host that may have none: fp16 reaches tensor cores, machine code comes out."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.contract.record_values import make_record
from tests.integration.compiler_operators import conv, prepared
from tests.unit.test_cuda_build import cubins, needs_nvrtc, sm_of
from tuner_core.compiler.tvm_setup import load_tvm
from tuner_core.model import Workload
from tuner_core.store.open import open_store
from tuner_server.build.pool import BuildPool
from tuner_server.gpu.target import DeviceFacts, cuda_target_json
from tuner_server.processes.spawner import Spawner
from tuner_server.search.pool import SearchPool, SearchSettings

H200 = cuda_target_json(DeviceFacts("NVIDIA H200", "sm_90", 132, 139 << 30, 1024, 49152, 65536, 60 << 20, 32))


def matmul(dtype: str) -> Workload:
    """A product of two 64 x 64 matrices."""
    load_tvm(intrinsics=True)
    import tvm
    from tvm import te

    from tuner_core.compiler.workload import workload_from_module

    a, b = te.placeholder((64, 64), dtype, name="A"), te.placeholder((64, 64), dtype, name="B")
    k = te.reduce_axis((0, 64), name="k")
    c = te.compute((64, 64), lambda i, j: te.sum(a[i, k] * b[k, j], axis=k), name="C")
    function = te.create_prim_func([a, b, c]).with_attr("global_symbol", "main")
    return workload_from_module(tvm.IRModule({"main": function}))


def fp16_model() -> Any:
    """One convolution, 3x3 in NHWC; 196 rows of the product are no multiple of a tensor core's 16."""
    return prepared(
        lambda op, x, w: conv(op, x, w, padding=(1, 1), data_layout="NHWC", kernel_layout="OHWI"),
        (1, 14, 14, 64),
        (64, 3, 3, 64),
        dtype="float16",
        target=H200,
    )


def fp16_convolution() -> Workload:
    """The workload of :func:`fp16_model`."""
    (task,) = fp16_model().tasks
    return task.workload


@needs_nvrtc
def test_searched_candidates_of_an_fp16_convolution_run_on_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    import tvm
    from tvm.target import Target

    from tuner_core.compiler import cuda_build
    from tuner_core.compiler.trace import apply_trace
    from tuner_core.compiler.workload import module_from_body
    from tuner_server.search.messages import KnownTrial
    from tuner_server.search.session import SearchSession

    workload = fp16_convolution()
    session = SearchSession(workload.body, H200, SearchSettings(), seed=0)
    traces = session.generate(16)
    session.report([KnownTrial(trace, 10.0 + number) for number, trace in enumerate(traces)])
    traces += session.generate(8)  # by the cost model now
    assert len(traces) == 24
    assert all("wmma_sync_16x16x16" in json.dumps(json.loads(trace)[0]) for trace in traces)
    tried = len(traces) + sum(session.rejections.values())
    assert len(traces) / tried > 0.2, session.rejections  # most of what is tried in vain asks for too much memory

    sources = []
    compile_source = cuda_build.build_cubin

    def keep_source(source: str, arch: str, cache: object = None) -> bytes:
        sources.append(source)
        return compile_source(source, arch)

    monkeypatch.setattr(cuda_build, "build_cubin", keep_source)
    cuda_build.enable_cuda_builds()
    target = Target(json.loads(H200))
    with target:
        module = apply_trace(module_from_body(workload.body), min(traces, key=len)).mod
        library = tvm.build(module, target=target)
    (source,) = sources
    assert "nvcuda::wmma::mma_sync" in source
    assert "extern __shared__" in source
    assert library is not None


def test_a_tensor_core_schedule_applies_to_the_models_own_module() -> None:
    """It names blocks after buffers, which the model's module calls otherwise than the workload that was measured."""
    import tvm
    from tvm import relax
    from tvm.target import Target

    from tuner_client.records import RecordDatabase
    from tuner_core.compiler.apply import apply_schedules
    from tuner_server.search.messages import SearchSettings
    from tuner_server.search.session import SearchSession

    model = fp16_model()
    (task,) = model.tasks
    (trace,) = SearchSession(task.workload.body, H200, SearchSettings(), seed=0).generate(1)
    target = Target(json.loads(H200))
    scheduled, coverage = apply_schedules(model.module, target, {task.workload.digest: trace})
    assert coverage.invalid == {}
    assert len(coverage.tuned) == 1
    assert "wmma" in scheduled.script()

    store = open_store("sqlite:///" + str(Path(tempfile.mkdtemp()) / "records.sqlite"))
    record = make_record(task.workload, trace=trace, target_json=H200, sm_count=32, median_us=5.0)
    store.commit([record], [task.workload])
    database = RecordDatabase(store, device_model=record.device_model, sm_count=32, target=H200)
    with target, database, tvm.transform.PassContext(opt_level=3):
        applied = relax.transform.MetaScheduleApplyDatabase()(model.module)
    assert "wmma" in applied.script()  # TVM's own pass takes it, too


MODEL_BUILD = """
import sys
import numpy as np
from tests.integration.compiler_operators import conv, prepared
from tests.integration.test_cuda_search import H200
from tuner_client.model.prepare import parse_target
from tuner_core.compiler.apply import apply_schedules
from tuner_core.compiler.executable import build_executable, export_executable
model = prepared(lambda op, x, w: conv(op, x, w, padding=(1, 1)), (1, 16, 14, 14), (32, 16, 3, 3), dtype="float16",
                 target=H200)
assert model.layout == "NHWC"
scheduled, _ = apply_schedules(model.module, parse_target(H200), {})
export_executable(build_executable(scheduled, parse_target(H200)), sys.argv[1])
"""
LOAD = """
import sys
from tuner_core.compiler.cuda_libraries import load_tvm_cuda_runtime
from tuner_core.compiler.tvm_setup import load_tvm
load_tvm()
import tvm, tvm_ffi
load_tvm_cuda_runtime(allow_stub=True)
def refuse(source):
    print("COMPILED AT LOAD")
    raise RuntimeError("a source was left to compile")
tvm_ffi.register_global_func("tvm_callback_cuda_compile", refuse, override=True)
module = tvm.runtime.load_module(sys.argv[1])
kinds, todo = [], [module]
while todo:
    found = todo.pop()
    kinds.append(str(found.kind))
    todo += list(found.imports)
print(kinds)
from pathlib import Path
assert "libnvrtc" not in Path("/proc/self/maps").read_text(), "NVRTC was loaded"
"""


@needs_nvrtc
def test_a_model_built_for_a_gpu_holds_cubins_and_loads_without_a_compiler(tmp_path: Path) -> None:
    built = tmp_path / "model.so"
    for script in (MODEL_BUILD, LOAD):
        done = subprocess.run(
            [sys.executable, "-c", script, str(built)],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert "cuda" in done.stdout and "COMPILED" not in done.stdout
    data = built.read_bytes()
    images = list(cubins(data))
    assert images and {sm_of(image) for image in images} == {90}
    assert b"__global__" not in data


def test_the_target_of_a_device_says_what_schedules_depend_on() -> None:
    facts = DeviceFacts("NVIDIA H200", "sm_90", 132, 139 << 30, 1024, 49152, 65536, 60 << 20, 32)
    load_tvm()
    from tvm.target import Target

    attributes = Target(json.loads(cuda_target_json(facts))).attrs
    assert str(attributes["arch"]) == "sm_90"
    assert int(attributes["max_shared_memory_per_block"]) == 49152
    assert int(attributes["registers_per_block"]) == 65536
    assert int(attributes["l2_cache_size_bytes"]) == 60 << 20
    assert int(attributes["max_threads_per_block"]) == 1024
    assert int(attributes["thread_warp_size"]) == 32


@needs_nvrtc
@pytest.mark.parametrize(("dtype", "tensor_cores"), [("float32", False), ("float16", True)])
def test_candidates_for_a_gpu_build_to_its_machine_code(tmp_path: Path, dtype: str, tensor_cores: bool) -> None:
    workload = matmul(dtype)

    async def body() -> None:
        spawner = Spawner(tmp_path / "logs")
        search = SearchPool(spawner, 1, SearchSettings())
        build = BuildPool(spawner, 1, tmp_path / "scratch", timeout_s=120)
        await spawner.start()
        try:
            await search.open("task", workload, H200, seed=0, known=[])
            traces = await search.generate("task", 4)
            assert traces
            for trace in traces:
                instructions = json.dumps(json.loads(trace)[0])
                assert ("wmma_sync_16x16x16" in instructions) is tensor_cores
            shortest = min(traces, key=len)
            artifact = await build.build(workload, shortest, H200)
            (cubin,) = cubins(artifact.path.read_bytes())
            assert sm_of(cubin) == 90
        finally:
            await search.stop()
            await build.stop()
            await spawner.stop()

    asyncio.run(body())
