"""Run a built model with stock TVM alone: nothing of this project is imported.

    python examples/run_built.py squeezenet.so

The file holds a Relax VM executable with the weights bound. Inputs are drawn at random, shapes come from the file.
"""

from __future__ import annotations

import os
import statistics
import sys
import time

# TVM takes half of the cores, as if every two of them shared one, unless it is told otherwise.
os.environ.setdefault("TVM_NUM_THREADS", str(len(os.sched_getaffinity(0))))

import numpy as np
import tvm
from tvm import relax

RUNS = 20


def main() -> None:
    """Load, run, print the outputs' shapes and the median latency."""
    if len(sys.argv) < 2:
        sys.exit("usage: run_built.py BUILT.so [cpu|cuda] [1,3,224,224 ...]")
    device = tvm.runtime.device(sys.argv[2] if len(sys.argv) > 2 else "cpu")
    shapes = [tuple(int(n) for n in text.split(",")) for text in sys.argv[3:]] or [(1, 3, 224, 224)]
    machine = relax.VirtualMachine(tvm.runtime.load_module(sys.argv[1]), device)
    random = np.random.default_rng(0)
    inputs = [tvm.runtime.tensor(random.uniform(0.1, 1, shape).astype("float32"), device) for shape in shapes]

    outputs = machine["main"](*inputs)
    times_ms = []
    for _ in range(RUNS):
        began = time.perf_counter()
        machine["main"](*inputs)
        device.sync()
        times_ms.append(1e3 * (time.perf_counter() - began))
    flat = [outputs] if hasattr(outputs, "numpy") else list(outputs)
    print(f"{sys.argv[1]} in stock TVM {tvm.__version__}: outputs {[tuple(out.shape) for out in flat]}, ", end="")
    print(f"median of {RUNS} runs {statistics.median(times_ms):.2f} ms")


if __name__ == "__main__":
    main()
