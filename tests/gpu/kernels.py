"""Kernels for tests of measurement on a GPU: one that is right, and one for each way to misbehave.

Each has arguments A and B of ``SIZE`` float32 values, so that all of them share a worker's buffers. They build without
a GPU, and for a CPU as well, on which the tests' own logic can be rehearsed.
"""

from __future__ import annotations

import json
from pathlib import Path

from tuner_core.compiler.tvm_setup import load_tvm
from tuner_core.model import EvaluatorSettings
from tuner_server.measure.requests import MeasureRequest

SIZE = 1 << 20
ARGS_INFO = (("TENSOR", "float32", (SIZE,)),) * 2
H200_TARGET = json.dumps({"kind": "cuda", "arch": "sm_90", "max_threads_per_block": 1024,
                          "max_shared_memory_per_block": 49152, "thread_warp_size": 32})  # fmt: skip

_WARP = """
    for block in BLOCKS(1):
        for thread in THREADS(32):
"""


def _greedy(elements: int) -> str:
    """An intermediate of so many float32 values, used far apart so that it is not compacted."""
    return f"""
    huge = T.alloc_buffer((T.int64({elements}),), "float32")
    for block in BLOCKS(1):
        for thread in THREADS(32):
            huge[T.Cast("int64", thread) * T.int64({elements // 32})] = A[thread]
    for block in BLOCKS(1):
        for thread in THREADS(32):
            B[thread] = huge[T.Cast("int64", thread) * T.int64({elements // 32})]
"""


BODIES = {
    # B = A + 1
    "good": f"""
    for block in BLOCKS({SIZE // 256}):
        for thread in THREADS(256):
            B[block * 256 + thread] = A[block * 256 + thread] + T.float32(1)
""",
    # something to be in the middle of
    "slow": _WARP
    + """
            for step in T.serial(T.int64(1 << 25)):
                B[thread] = B[thread] * A[thread] + A[thread + 32]
""",
    # the same for hours
    "endless": _WARP
    + """
            for step in T.serial(T.int64(1 << 40)):
                B[thread] = B[thread] * A[thread] + A[thread + 32]
""",
    # reads terabytes beyond its argument
    "illegal": _WARP
    + """
            B[thread] = A[T.Cast("int64", thread) + T.int64(1 << 42)]
""",
    # needs 48 GiB of device memory: a whole GPU has that, a worker with a share of it has not
    "hungry": _greedy(3 << 32),
    # needs 2 TB
    "greedy": _greedy(1 << 39),
}
_HEAD = f"""
@T.prim_func
def main(A: T.Buffer(({SIZE},), "float32"), B: T.Buffer(({SIZE},), "float32")):
    T.func_attr({{"global_symbol": "main", "tirx.noalias": True}})
"""


def build(name: str, directory: Path, target_json: str = H200_TARGET) -> Path:
    """Build one of :data:`BODIES`.

    Args:
        name: Its name.
        directory: Where it goes.
        target_json: What to build for.
    """
    load_tvm(intrinsics=True)
    import tvm
    import tvm.script
    from tvm.target import Target

    from tuner_server.build.compile import compile_module, prepare_for_target

    target = Target(json.loads(target_json))
    body = BODIES[name]
    for mark, axis in (("BLOCKS(", "blockIdx.x"), ("THREADS(", "threadIdx.x")):
        while (at := body.find(mark)) >= 0:
            extent = body[at + len(mark) : body.index(")", at)]
            loop = (
                f'T.thread_binding({extent}, thread="{axis}")' if target.kind.name == "cuda" else f"T.serial({extent})"
            )
            body = body[:at] + loop + body[body.index(")", at) + 1 :]
    function = tvm.script.from_source(_HEAD.lstrip() + body)
    prepare_for_target(target)
    return compile_module(tvm.IRModule({"main": function}), target, directory / f"{name}.so")


def built(directory: Path, name: str) -> Path:
    """What :func:`build` has left: a kernel's file, or a library."""
    (path,) = (path for path in (directory / f"{name}.kernel", directory / f"{name}.so") if path.exists())
    return path


def request(artifact: Path, timeout_s: float = 10.0) -> MeasureRequest:
    """A measurement of one of them."""
    return MeasureRequest(artifact, ARGS_INFO, EvaluatorSettings(), timeout_s)
