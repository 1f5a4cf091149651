"""Kernels for tests on a GPU: one that is right, and one for each way to misbehave. They build without a GPU.

Each has arguments A and B of ``SIZE`` float32 values, so that all of them share a worker's buffers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tuner_core.compiler.tvm_setup import load_tvm

load_tvm(intrinsics=True)

import tvm
from tvm.script import tirx as T
from tvm.target import Target

from tuner_core.model import EvaluatorSettings
from tuner_server.build.compile import compile_module, prepare_for_target
from tuner_server.measure.requests import MeasureRequest

SIZE = 1 << 20
ARGS_INFO = (("TENSOR", "float32", (SIZE,)),) * 2
TARGET = json.dumps({"kind": "cuda", "arch": "sm_90", "max_threads_per_block": 1024,
                     "max_shared_memory_per_block": 49152, "thread_warp_size": 32})  # fmt: skip


def good() -> Any:
    """B = A + 1."""

    @T.prim_func
    def main(A: T.Buffer((SIZE,), "float32"), B: T.Buffer((SIZE,), "float32")):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        for block in T.thread_binding(SIZE // 256, thread="blockIdx.x"):
            for thread in T.thread_binding(256, thread="threadIdx.x"):
                B[block * 256 + thread] = A[block * 256 + thread] + T.float32(1)

    return main


def slow() -> Any:
    """About a tenth of a second on one SM: something to be in the middle of."""

    @T.prim_func
    def main(A: T.Buffer((SIZE,), "float32"), B: T.Buffer((SIZE,), "float32")):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        for _block in T.thread_binding(1, thread="blockIdx.x"):
            for thread in T.thread_binding(32, thread="threadIdx.x"):
                for _step in range(1 << 20):
                    B[thread] = B[thread] * A[thread] + A[thread + 32]

    return main


def endless() -> Any:
    """The same for hours."""

    @T.prim_func
    def main(A: T.Buffer((SIZE,), "float32"), B: T.Buffer((SIZE,), "float32")):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        for _block in T.thread_binding(1, thread="blockIdx.x"):
            for thread in T.thread_binding(32, thread="threadIdx.x"):
                for _step in T.serial(T.int64(1 << 40)):
                    B[thread] = B[thread] * A[thread] + A[thread + 32]

    return main


def illegal() -> Any:
    """Reads terabytes beyond its argument."""

    @T.prim_func
    def main(A: T.Buffer((SIZE,), "float32"), B: T.Buffer((SIZE,), "float32")):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        for _block in T.thread_binding(1, thread="blockIdx.x"):
            for thread in T.thread_binding(32, thread="threadIdx.x"):
                B[thread] = A[T.Cast("int64", thread) + T.int64(1 << 42)]

    return main


def greedy() -> Any:
    """Needs 2 TB of device memory for an intermediate."""

    @T.prim_func
    def main(A: T.Buffer((SIZE,), "float32"), B: T.Buffer((SIZE,), "float32")):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        huge = T.alloc_buffer((T.int64(1 << 39),), "float32")
        for _block in T.thread_binding(1, thread="blockIdx.x"):
            for thread in T.thread_binding(32, thread="threadIdx.x"):
                huge[T.Cast("int64", thread)] = A[thread]
        for _block in T.thread_binding(1, thread="blockIdx.x"):
            for thread in T.thread_binding(32, thread="threadIdx.x"):
                B[thread] = huge[T.Cast("int64", thread)]

    return main


KERNELS: dict[str, Callable[[], Any]] = {"good": good, "slow": slow, "endless": endless, "illegal": illegal, "greedy": greedy}


def build(name: str, directory: Path, target_json: str = TARGET) -> Path:
    """Build one of :data:`KERNELS`.

    Args:
        name: Its name.
        directory: Where its library goes.
        target_json: What to build for.
    """
    target = Target(json.loads(target_json))
    prepare_for_target(target)
    out = directory / f"{name}.so"
    compile_module(tvm.IRModule({"main": KERNELS[name]()}), target, out)
    return out


def request(artifact: Path, timeout_s: float = 10.0) -> MeasureRequest:
    """A measurement of one of them."""
    return MeasureRequest(artifact, ARGS_INFO, EvaluatorSettings(), timeout_s)
