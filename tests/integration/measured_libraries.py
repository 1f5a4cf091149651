"""Small libraries that behave in known ways when they are measured; built with real TVM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tuner_core.compiler.tvm_setup import load_tvm
from tuner_server.measure.inputs import ArgsInfo

N = 64
MATMUL_ARGS: ArgsInfo = (("TENSOR", "float32", (N, N)),) * 3
VECTOR_ARGS: ArgsInfo = (("TENSOR", "float32", (N,)),) * 2
MODEL_ARGS: ArgsInfo = tuple(("TENSOR", "float32", shape) for shape in ((4, 32), (32, 64), (64,), (64, 8)))
TARGET = {"kind": "llvm", "num-cores": 1}


def matmul(depth: int = N, dtype: str = "float32") -> Any:
    """A PrimFunc; with a ``depth`` below N it leaves terms out."""
    load_tvm()
    from tvm import te

    a = te.placeholder((N, N), dtype, name="A")
    b = te.placeholder((N, N), dtype, name="B")
    k = te.reduce_axis((0, depth), name="k")
    c = te.compute((N, N), lambda i, j: te.sum(a[i, k] * b[k, j], axis=k), name="C")
    return te.create_prim_func([a, b, c])


def calling(function: str, *arguments: int) -> Any:
    """A PrimFunc that copies a vector and calls a C function for its last element."""
    load_tvm()
    import tvm
    from tvm import te, tirx

    a = te.placeholder((N,), "float32", name="A")

    def element(i: Any) -> Any:
        call = tvm.tirx.call_extern("int32", function, *arguments)
        return tirx.if_then_else(i == N - 1, a[i] + tirx.Cast("float32", call), a[i])

    return te.create_prim_func([a, te.compute((N,), element, name="B")])


def elementwise(kind: str) -> Any:
    """A PrimFunc from vector to vector: ``log_of_negative`` gives NaN, ``half`` leaves half of the output unwritten."""
    load_tvm()
    from tvm import te, tirx

    a = te.placeholder((N,), "float32", name="A")
    if kind == "log_of_negative":
        return te.create_prim_func([a, te.compute((N,), lambda i: tirx.log(a[i] - 10.0), name="B")])
    assert kind == "half"
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def half(a: T.Buffer((64,), "float32"), b: T.Buffer((64,), "float32")) -> None:
        for i in range(32):
            with T.sblock("half"):
                vi = T.axis.spatial(32, i)
                b[vi] = a[vi]

    return half


def build(function: Any, path: Path) -> Path:
    """Build a PrimFunc as the library's ``main``."""
    import tvm

    target = tvm.target.Target(TARGET)
    with target:
        mod = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
        tvm.build(mod, target=target).export_library(str(path))
    return path


def build_model(path: Path, *, shift: float = 0.0, nan: bool = False) -> Path:
    """A Relax executable: a perceptron of two layers; its main takes the input, then the weights."""
    load_tvm()
    import tvm
    from tvm import relax

    builder = relax.BlockBuilder()
    tensor = relax.TensorType if hasattr(relax, "TensorType") else relax.TensorStructInfo
    x, w0, bias, w1 = (relax.Var(f"p{i}", tensor(shape, dtype)) for i, (_, dtype, shape) in enumerate(MODEL_ARGS))
    with builder.function("main", [x, w0, bias, w1]):
        with builder.dataflow():
            hidden = builder.emit(relax.op.nn.relu(relax.op.add(relax.op.matmul(x, w0), bias)))
            out = builder.emit(relax.op.matmul(hidden, w1))
            if shift:
                out = builder.emit(relax.op.add(out, relax.const(shift, "float32")))
            if nan:
                out = builder.emit(relax.op.log(relax.op.negative(relax.op.abs(out))))
            result = builder.emit_output(out)
        builder.emit_func_output(result)
    target = tvm.target.Target(TARGET)
    with target:
        relax.build(builder.get(), target=target).export_library(str(path))
    return path
