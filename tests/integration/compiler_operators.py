"""One-operator models, prepared as real ones are: small, and of every kind that the schedules treat differently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tuner_client.model.prepare import ExtractedTask, Prepared, prepare
from tuner_core.compiler.tvm_setup import load_tvm

LLVM = '{"kind":"llvm","num-cores":2}'
AVX512 = '{"kind":"llvm","mcpu":"skylake-avx512","num-cores":2}'
CUDA = '{"arch":"sm_90","kind":"cuda","max_shared_memory_per_block":49152,"max_threads_per_block":1024}'

Shape = tuple[int, ...]


def prepared(compute: Callable[..., Any], *shapes: Shape, dtype: str = "float32", target: str = LLVM) -> Prepared:
    """The model that computes ``compute(op, *inputs)``, where ``op`` is ``tvm.relax.op``."""
    load_tvm(intrinsics=True)
    from tvm import relax

    builder = relax.BlockBuilder()
    inputs = [relax.Var(f"x{number}", relax.TensorType(shape, dtype)) for number, shape in enumerate(shapes)]
    with builder.function("main", inputs):
        with builder.dataflow():
            result = builder.emit_output(builder.normalize(compute(relax.op, *inputs)))
        builder.emit_func_output(result)
    return prepare(builder.get(), target)


def heaviest(compute: Callable[..., Any], *shapes: Shape, dtype: str = "float32", target: str = LLVM) -> ExtractedTask:
    """The model's task with the longest description of a reduction: its tunable one, or else its last."""
    tasks = prepared(compute, *shapes, dtype=dtype, target=target).tasks
    return next((task for task in tasks if task.tunable), tasks[-1])


def conv(op: Any, x: Any, w: Any, **attributes: Any) -> Any:
    """A convolution and a ReLU."""
    return op.nn.relu(op.nn.conv2d(x, w, **attributes))


def run(module: Any, target: Any, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Outputs of one TIR function (``main``) whose parameters after ``inputs`` are outputs."""
    import tvm

    with target:
        library = tvm.build(module, target=target)
    buffers = [tvm.runtime.tensor(value) for value in inputs]
    for parameter in module["main"].params[len(inputs) :]:
        shape = tuple(int(extent) for extent in parameter.shape)
        buffers.append(tvm.runtime.tensor(np.zeros(shape, str(parameter.dtype))))
    library["main"](*buffers)
    return [buffer.numpy() for buffer in buffers[len(inputs) :]]


def random_inputs(task: ExtractedTask, count: int) -> list[np.ndarray]:
    """Seeded inputs in [0.1, 1), or small integers, for the first ``count`` parameters."""
    rng = np.random.default_rng(7)
    values = []
    for _, dtype, shape in task.workload.args_info[:count]:
        if dtype.startswith("float"):
            values.append(rng.uniform(0.1, 1.0, shape).astype(dtype))
        else:
            values.append(rng.integers(0, 2, shape).astype(dtype))
    return values
