"""Search and build for a GPU on a host that may have none: fp16 reaches tensor cores, machine code comes out."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.unit.test_cuda_build import cubins, needs_nvrtc, sm_of
from tuner_core.model import Workload
from tuner_server.build.pool import BuildPool
from tuner_server.gpu.target import DeviceFacts, cuda_target_json
from tuner_server.processes.spawner import Spawner
from tuner_server.search.pool import SearchPool, SearchSettings

H200 = cuda_target_json(DeviceFacts("NVIDIA H200", "sm_90", 132, 139 << 30, 1024, 49152, 65536, 60 << 20, 32))


def matmul(dtype: str) -> Workload:
    """A product of two 64 x 64 matrices."""
    from tuner_core.compiler.tvm_setup import load_tvm

    load_tvm(intrinsics=True)
    import tvm
    from tvm import te

    from tuner_core.compiler.workload import workload_from_module

    a, b = te.placeholder((64, 64), dtype, name="A"), te.placeholder((64, 64), dtype, name="B")
    k = te.reduce_axis((0, 64), name="k")
    c = te.compute((64, 64), lambda i, j: te.sum(a[i, k] * b[k, j], axis=k), name="C")
    function = te.create_prim_func([a, b, c]).with_attr("global_symbol", "main")
    return workload_from_module(tvm.IRModule({"main": function}))


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
