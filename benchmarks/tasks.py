"""The operators that both sides of a benchmark tune.

On a CPU a convolution, a depthwise convolution and a dense layer of a small model. On a GPU two convolutions and a
matrix product by themselves, and the 1x1 and the 3x3 convolution that ResNet-50 calls most often, with their weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tuner_client.model.load import load_model
from tuner_client.model.prepare import ExtractedTask, prepare
from tuner_core.compiler.tvm_setup import load_tvm
from tuner_core.model import Workload

MODEL = "shufflenet"
OPERATORS = ("conv2d", "depthwise_conv2d", "dense")
GPU_MODEL = "resnet50"
GPU_KERNELS = ("1x1", "3x3")


@dataclass(frozen=True)
class BenchTask:
    """One operator.

    Attributes:
        name: Name within its model.
        description: For people.
        weight: How often the model calls it.
        body: Canonical JSON of its workload.
    """

    name: str
    description: str
    weight: int
    body: str

    def document(self) -> dict[str, Any]:
        """As JSON, for the processes that tune and measure it."""
        return asdict(self)


def light_model(name: str) -> Path:
    """Path of a ``light_*.onnx`` model that the package onnx brings along.

    Args:
        name: E.g. ``squeezenet``.
    """
    import onnx

    return Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / f"light_{name}.onnx"


def extract(target_json: str, operators: Sequence[str] = OPERATORS) -> list[ExtractedTask]:
    """For each kind of operator, the one of :data:`MODEL` that is called most often (the first of those).

    Args:
        target_json: Target to prepare the model for.
        operators: Kinds.
    """
    load_tvm()
    prepared = prepare(load_model(light_model(MODEL), {}).module, target_json)
    chosen = []
    for operator in operators:
        candidates = [task for task in prepared.tasks if task.workload.op == operator and task.tunable]
        if not candidates:
            raise LookupError(f"{MODEL} has no {operator} worth tuning")
        chosen.append(max(candidates, key=lambda task: task.weight))
    return chosen


def plain_workloads(small: bool = False) -> list[Workload]:
    """A 3x3 and a 1x1 convolution and a matrix product by themselves, fp32.

    Args:
        small: With few operations, for a rehearsal on a CPU.
    """
    load_tvm(intrinsics=True)
    import tvm
    from tvm import te, topi

    from tuner_core.compiler.workload import workload_from_module

    def conv(extent: int, channels: int, kernel: int) -> Any:
        data = te.placeholder((1, extent, extent, channels), "float32", name="data")
        weight = te.placeholder((kernel, kernel, channels, channels), "float32", name="weight")
        out = topi.nn.conv2d_nhwc(data, weight, 1, kernel // 2, 1, out_dtype="float32")
        return te.create_prim_func([data, weight, out])

    def product(extent: int) -> Any:
        a, b = (te.placeholder((extent, extent), "float32", name=name) for name in "AB")
        k = te.reduce_axis((0, extent), name="k")
        return te.create_prim_func([a, b, te.compute((extent, extent), lambda i, j: te.sum(a[i, k] * b[k, j], axis=k))])

    functions = [conv(7, 16, 3), product(64)] if small else [conv(14, 256, 3), conv(56, 64, 1), product(1024)]
    modules = [tvm.IRModule({"main": function.with_attr("global_symbol", "main")}) for function in functions]
    return [workload_from_module(module) for module in modules]


def gpu_tasks(target_json: str) -> list[ExtractedTask]:
    """The operators of ``make bench-gpu``.

    Args:
        target_json: Target to prepare ResNet-50 for.
    """
    plain = [
        ExtractedTask(f"plain_{workload.op}_{number}", workload, 1, True)
        for number, workload in enumerate(plain_workloads())
    ]
    prepared = prepare(load_model(light_model(GPU_MODEL), {}).module, target_json)
    called = []
    for kernel in GPU_KERNELS:
        fitting = [task for task in prepared.tasks if task.tunable and f", {kernel}, fp32" in task.workload.description]
        if not fitting:
            raise LookupError(f"{GPU_MODEL} has no {kernel} convolution")
        called.append(max(fitting, key=lambda task: task.weight))
    return [*plain, *called]


def bench_tasks(extracted: list[ExtractedTask]) -> list[BenchTask]:
    """The same as plain values."""
    return [BenchTask(task.name, task.workload.description, task.weight, task.workload.body) for task in extracted]
