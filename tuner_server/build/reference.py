"""Reference outputs of a workload: its unscheduled loops, compiled for the host and run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tvm
from tvm.target import Target
from tvm.target.codegen import llvm_get_system_cpu

from tuner_server.build.compile import compile_module
from tuner_server.measure.arguments import plan_arguments
from tuner_server.measure.inputs import ArgsInfo, Array, draw_inputs, numpy_dtype, save_reference

_DRAWS = 3


def write_reference(mod: tvm.IRModule, args_info: ArgsInfo, seed: int, out: Path) -> None:
    """Run a workload as written and save what went in and what came out.

    Inputs are drawn again when an output holds NaN or Inf; after the third time they are saved as they are, and a
    comparison with them is inconclusive.

    Args:
        mod: The workload's module.
        args_info: Its parameters, as in :class:`tuner_core.model.Workload`.
        seed: Of the inputs.
        out: ``.npz`` to write, whole or not at all.
    """
    library = out.with_suffix(".reference.so")
    compile_module(mod, Target({"kind": "llvm", "mcpu": llvm_get_system_cpu()}), library)
    run = tvm.runtime.load_module(str(library))["main"]
    library.unlink()  # it stays mapped
    plan = plan_arguments(mod)
    for attempt in range(_DRAWS):
        inputs = draw_inputs(args_info, plan.outputs, plan.index_limits, seed, attempt)
        rest = iter(inputs)
        tensors = [
            tvm.runtime.tensor(np.zeros(shape, numpy_dtype(dtype)) if position in plan.outputs else next(rest))
            for position, (_kind, dtype, shape) in enumerate(args_info)
        ]
        run(*tensors)
        outputs = [tensors[position].numpy() for position in plan.outputs]
        if _finite(outputs):
            break
    partial = out.with_suffix(".partial.npz")
    save_reference(partial, inputs, outputs)
    os.replace(partial, out)


def _finite(arrays: Sequence[Array]) -> bool:
    return all("int" in str(array.dtype) or bool(np.isfinite(array).all()) for array in arrays)
