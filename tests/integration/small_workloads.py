"""Workloads small enough to search, build and run in milliseconds."""

from __future__ import annotations

from typing import Any

from tuner_core.compiler.tvm_setup import load_tvm
from tuner_core.compiler.workload import workload_from_module
from tuner_core.model import Workload

LLVM = '{"kind":"llvm","num-cores":2}'


def matmul(size: int = 64, addend: float = 1.0) -> Workload:
    """A matrix product plus ``addend``, ``size`` in every direction."""
    te = _te()
    a = te.placeholder((size, size), name="A")
    b = te.placeholder((size, size), name="B")
    k = te.reduce_axis((0, size), name="k")
    c = te.compute((size, size), lambda i, j: te.sum(a[i, k] * b[k, j], axis=k), name="C")
    d = te.compute((size, size), lambda i, j: c[i, j] + addend, name="D")
    return _workload([a, b, d])


def copy_of(extent: int) -> Workload:
    """An operator with hardly anything to decide."""
    te = _te()
    a = te.placeholder((extent,), name="A")
    return _workload([a, te.compute((extent,), lambda i: a[i] + 1.0, name="B")])


def _te() -> Any:
    load_tvm()
    from tvm import te

    return te


def _workload(tensors: list[Any]) -> Workload:
    import tvm
    from tvm import te

    return workload_from_module(tvm.IRModule({"main": te.create_prim_func(tensors)}))


def forbidden() -> Workload:
    """An operator that calls a function of the host by name."""
    import tvm

    te = _te()
    a = te.placeholder((8,), name="A")
    b = te.compute((8,), lambda i: tvm.tirx.call_extern("float32", "getenv", a[i]), name="B")
    return _workload([a, b])


def model_json() -> tuple[str, str]:
    """A prepared model that computes ``(a @ b + 1) @ b + 1`` with two calls of :func:`matmul`; and matmul's digest."""
    workload = matmul()
    import tvm
    from tvm import relax

    from tuner_core.compiler.workload import module_from_body

    builder = relax.BlockBuilder()
    function = module_from_body(workload.body)["main"].without_attr("global_symbol")
    shape = relax.TensorType((64, 64), "float32")
    a, b = relax.Var("a", shape), relax.Var("b", shape)
    with builder.function("main", [a, b]):
        var = builder.add_func(function, "matmul")
        with builder.dataflow():
            first = builder.emit(relax.call_tir(var, (a, b), shape))
            second = builder.emit_output(relax.call_tir(var, (first, b), shape))
        builder.emit_func_output(second)
    return tvm.ir.save_json(builder.get()), workload.digest


def slow_to_build(stages: int = 200) -> Workload:
    """A chain of small operators: some seconds of lowering and code generation."""
    te = _te()
    first = te.placeholder((16, 16), name="x")

    def stage(values: Any) -> Any:
        return te.compute((16, 16), lambda i, j: te.sin(values[i, j]) * te.exp(values[j, i]))

    last = first
    for _ in range(stages):
        last = stage(last)
    return _workload([first, last])
