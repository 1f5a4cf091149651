"""Reference outputs of a workload: its loops, at most in another order, compiled for the host and run."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.target import Target
from tvm.target.codegen import llvm_get_system_cpu

from tuner_core.compiler.graph import load_graph
from tuner_server.build.compile import compile_module
from tuner_server.build.reference_loops import in_fast_order
from tuner_server.measure.arguments import plan_arguments
from tuner_server.measure.inputs import ArgsInfo, Array, draw_inputs, numpy_dtype, save_reference

_DRAWS = 3
_HALF = re.compile(r'"b?float16"')


def write_reference(mod: tvm.IRModule, args_info: ArgsInfo, seed: int, out: Path) -> None:
    """Run a workload with half precision in single, and save what went in and what came out.

    Long sums are made side by side, but each in the order of its terms: :mod:`tuner_server.build.reference_loops`.

    Kept in half precision, a sum of thousands of terms one after the other is further from the truth than any kernel.

    Inputs are drawn again when an output holds NaN or Inf; after the third time they are saved as they are, and a
    comparison with them is inconclusive.

    Args:
        mod: The workload's module.
        args_info: Its parameters, as in :class:`tuner_core.model.Workload`.
        seed: Of the inputs.
        out: ``.npz`` to write, whole or not at all.
    """
    library = out.with_suffix(".reference.so")
    exact = _in_single_precision(mod)
    _compile(exact, library)
    run = tvm.runtime.load_module(str(library))["main"]
    library.unlink()  # it stays mapped
    plan = plan_arguments(mod)
    for attempt in range(_DRAWS):
        inputs = draw_inputs(args_info, plan.outputs, plan.index_limits, seed, attempt)
        rest = iter(inputs)
        tensors = [
            tvm.runtime.tensor(
                np.zeros(shape, numpy_dtype(wide)) if position in plan.outputs else next(rest).astype(numpy_dtype(wide))
            )
            for position, (wide, (_kind, _dtype, shape)) in enumerate(zip(_dtypes(exact), args_info, strict=True))
        ]
        run(*tensors)
        with np.errstate(over="ignore"):  # beyond half precision: Inf, and another draw
            outputs = [tensors[at].numpy().astype(numpy_dtype(args_info[at][1])) for at in plan.outputs]
        if _finite(outputs):
            break
    partial = out.with_suffix(".partial.npz")
    save_reference(partial, inputs, outputs, _terms(mod))
    os.replace(partial, out)


def _compile(mod: tvm.IRModule, library: Path) -> None:
    target = Target({"kind": "llvm", "mcpu": llvm_get_system_cpu()})
    try:
        compile_module(in_fast_order(mod), target, library)
    except Exception:  # an order that TVM cannot generate code for: as it is written, it surely can
        compile_module(mod, target, library)


def _in_single_precision(mod: tvm.IRModule) -> tvm.IRModule:
    return load_graph(_HALF.sub('"float32"', tvm.ir.save_json(mod)))


def _dtypes(mod: tvm.IRModule) -> list[str]:
    return [str(parameter.dtype) for parameter in mod["main"].params]


def _terms(mod: tvm.IRModule) -> int:
    """Largest number of values that a block reduces to one."""
    found = [1]

    def note(block: Any) -> None:
        extents = [iterator.dom.extent for iterator in block.iter_vars if iterator.iter_type == tirx.IterVar.CommReduce]
        found.append(math.prod(int(extent) for extent in extents if isinstance(extent, int | tirx.IntImm)))

    tvm_ffi.structural_walk(mod["main"].body, (s_tir.SBlock, note))
    return max(found)


def _finite(arrays: Sequence[Array]) -> bool:
    return all("int" in str(array.dtype) or bool(np.isfinite(array).all()) for array in arrays)
