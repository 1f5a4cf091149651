"""What the host's code of a scheduled function does, where all that it does is to launch one kernel.

Such a function needs no host code to be measured: machine code, the order of its arguments and the extents of the
launch say everything, and neither LLVM nor a linker has to run for them. Import it once TVM is loaded.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx
from tvm.ir import CallingConv

SUFFIX = ".kernel"
_LISTS = ("buffers", "launch_params", "extents")


@dataclass(frozen=True)
class KernelCall:
    """One launch.

    Attributes:
        kernel: Name of the kernel in the machine code.
        buffers: For each of its parameters the position of the buffer among the function's arguments.
        launch_params: TVM's names of the extents that follow, e.g. ``blockIdx.x``; bytes of dynamic shared memory have
            one, too.
        extents: Their values.
    """

    kernel: str
    buffers: tuple[int, ...]
    launch_params: tuple[str, ...]
    extents: tuple[int, ...]


def only_call(mod: tvm.IRModule) -> KernelCall | None:
    """The launch that the host's part of a module consists of.

    Args:
        mod: Kernels and host functions after ``SplitHostDevice``, before ``MakePackedAPI``.

    Returns:
        None when it does anything else: more than one kernel, memory of its own, arguments that are no whole buffers.
    """
    functions = [function for function in mod.functions.values() if not _is_kernel(function)]
    if len(functions) != 1:
        return None
    body = functions[0].body
    statements = list(body.seq) if isinstance(body, tirx.SeqStmt) else [body]
    position = {parameter: at for at, parameter in enumerate(functions[0].params)}
    for statement in statements[:-1]:
        of = _data_of(statement.data) if isinstance(statement, tirx.DeclBuffer) else None
        if of not in position:
            return None
        position[statement.buffer] = position[of]
    last = statements[-1]
    call = last.value if isinstance(last, tirx.Evaluate) else None
    if not isinstance(call, tvm.ir.Call) or getattr(call.op, "name", "") != "tirx.call_ffi_kernel":
        return None
    kernel, *arguments = call.args
    launch_params = tuple(str(name) for name in call.attrs.launch_params)
    pointers = arguments[: len(arguments) - len(launch_params)]
    extents = arguments[len(pointers) :]
    buffers = [position.get(_data_of(pointer)) for pointer in pointers]
    if None in buffers or not all(isinstance(extent, tirx.IntImm) for extent in extents):
        return None
    return KernelCall(
        str(kernel.value),
        tuple(at for at in buffers if at is not None),
        launch_params,
        tuple(int(extent.value) for extent in extents),
    )


def write_kernel(path: Path, call: KernelCall, cubin: bytes) -> None:
    """Write a kernel's file: a line of JSON, then the machine code."""
    path.write_bytes(json.dumps(asdict(call)).encode() + b"\n" + cubin)


def read_kernel(path: Path) -> tuple[KernelCall, bytes]:
    """What :func:`write_kernel` wrote.

    Raises:
        OSError: It cannot be read.
        ValueError: It is something else.
    """
    head, _, cubin = path.read_bytes().partition(b"\n")
    try:
        fields = json.loads(head)
        return KernelCall(fields["kernel"], *(tuple(fields[name]) for name in _LISTS)), cubin
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path.name} is not a kernel's file") from None


def _is_kernel(function: Any) -> bool:
    return int(function.attrs.get("calling_conv", 0)) == CallingConv.DEVICE_KERNEL_LAUNCH


def _data_of(expression: Any) -> Any:
    """The buffer of which an expression is the data; None when it is something else."""
    if isinstance(expression, tvm.ir.Call) and getattr(expression.op, "name", "") == "tirx.buffer_data":
        return expression.args[0]
    return None
