"""Vectors of more elements than TVM writes properly: NVRTC takes the repaired kernel, and it moves the right bytes."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.test_cuda_lowering import source_of
from tests.integration.test_cuda_search import H200
from tests.unit.test_cuda_build import needs_nvrtc
from tuner_core.compiler import cuda_build, nvrtc
from tuner_core.compiler.cuda_source import rewritten
from tuner_core.compiler.lowering import lower
from tuner_core.compiler.tvm_setup import load_tvm

THREADS, LANES = 32, 8
# What a kernel that only moves elements needs of CUDA, for a host's compiler: the threads run one after the other.
HOST = """
#include <cstdio>
#include <cstring>
#define __global__
#define __device__
#define __restrict__
#define __launch_bounds__(threads)
struct half { unsigned short bits; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) longlong4 { long long x, y, z, w; };
struct { unsigned x = 0, y = 0, z = 0; } threadIdx, blockIdx;
"""
MAIN = """
int main() {
  static half from[1024];
  alignas(16) static half to[256];
  for (int i = 0; i < 1024; ++i) from[i].bits = i;
  for (threadIdx.x = 0; threadIdx.x < 32; ++threadIdx.x) main_kernel(%s);
  for (half one : to) std::printf("%%u ", one.bits);
}
"""


def gather() -> str:
    """Source of a kernel whose threads gather eight halves each: ``to[i] = from[i // 3 * 7 + i % 3]``."""
    load_tvm(intrinsics=True)
    import tvm
    from tvm import te
    from tvm.s_tir import Schedule
    from tvm.target import Target

    source = te.placeholder((1024,), "float16", name="A")
    gathered = te.compute((THREADS * LANES,), lambda i: source[i // 3 * 7 + tvm.tirx.floormod(i, 3)], name="B")
    function = te.create_prim_func([source, gathered]).with_attr("global_symbol", "main")
    schedule = Schedule(tvm.IRModule({"main": function}))
    (loop,) = schedule.get_loops(schedule.get_sblock("B"))
    thread, lane = schedule.split(loop, [THREADS, LANES])
    schedule.bind(thread, "threadIdx.x")
    schedule.vectorize(lane)
    target = Target(json.loads(H200))
    with target:
        _, devices, _ = lower(schedule.mod, target)
        return source_of(devices)


@needs_nvrtc
def test_eight_gathered_halves_become_one_vector(tmp_path: Path) -> None:
    source = gather()
    light: Any = cuda_build.light_source(source)
    with pytest.raises(nvrtc.CudaCompileError, match="too many arguments"):
        nvrtc.compile_cubin(light, cuda_build.nvrtc_options("sm_90"))
    assert cuda_build.build_cubin(source, "sm_90", cuda_build.CubinCache())

    text = rewritten(light)
    kernel = text[text.index("template <typename T> static __device__ inline longlong4") :]
    used = re.findall(r"template <typename T> .*?^}$", kernel, re.MULTILINE | re.DOTALL)
    entry = kernel[kernel.rindex('extern "C" __global__ void') :]
    arguments = re.findall(r"half\* (?:__restrict__ )?(\w+)", entry[: entry.index("{")])
    order = ", ".join("to" if name.startswith("B") else "from" for name in arguments)
    program = tmp_path / "gather.cpp"
    program.write_text("\n".join([HOST, *used, entry, MAIN % order]))
    options = ["-std=c++17", "-O1", "-fno-strict-aliasing", "-w"]
    subprocess.run(["c++", *options, str(program), "-o", str(tmp_path / "gather")], check=True)
    said = subprocess.run([tmp_path / "gather"], check=True, capture_output=True, text=True).stdout
    index = np.arange(THREADS * LANES)
    assert [int(one) for one in said.split()] == (index // 3 * 7 + index % 3).tolist()
