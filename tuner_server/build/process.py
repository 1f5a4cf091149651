"""The build process: replays schedules on workloads and compiles them. Role ``build`` of the prefork process."""

from __future__ import annotations

import json
import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tvm
from tvm.target import Target

from tuner_core.compiler.cuda_build import SourceTooLargeError, limited_statements
from tuner_core.compiler.guard import check_trace, load_lifted_module, load_workload
from tuner_core.compiler.trace import apply_trace, trace_to_json
from tuner_core.errors import InvalidRecordError, TunerError, UsageError
from tuner_core.model import FailureKind
from tuner_server.build.compile import compile_module, prepare_for_target
from tuner_server.processes.child import WorkError, one_line, serve
from tuner_server.processes.heap import keep_freed_memory, release_freed_memory
from tuner_server.processes.limits import limit_resources, limited_processor_time

_MODULES_KEPT = 32


class _Builder:
    def __init__(self, config: dict[str, Any]) -> None:
        self._cubin_cache = Path(config["cubin_cache"]) if config.get("cubin_cache") else None
        self._modules: OrderedDict[str, tvm.IRModule] = OrderedDict()
        self._targets: dict[str, Target] = {}

    def build(self, args: dict[str, Any]) -> dict[str, Any]:
        start = time.monotonic()
        mod, target = self._inputs(args)
        try:
            check_trace(args["trace"])
            schedule = apply_trace(mod, args["trace"])
        except (InvalidRecordError, UsageError) as error:
            raise WorkError(FailureKind.INVALID_TRACE, str(error)) from None
        with limited_processor_time(args["cpu_limit_s"]), limited_statements():
            suffix = self._compile(schedule.mod, target, args["out"])
        return {"suffix": suffix, "seconds": time.monotonic() - start}

    def fallback(self, args: dict[str, Any]) -> dict[str, Any]:
        from tuner_core.compiler.fallback import fallback_schedule

        start = time.monotonic()
        mod, target = self._inputs(args)
        try:
            with target:
                schedule = fallback_schedule(mod, target)
        except Exception as error:
            raise WorkError(FailureKind.BUILD_ERROR, f"no fallback schedule: {one_line(error)}") from None
        suffix = self._compile(schedule.mod, target, args["out"])
        return {"suffix": suffix, "trace": trace_to_json(schedule), "seconds": time.monotonic() - start}

    def reference(self, args: dict[str, Any]) -> dict[str, Any]:
        from tuner_server.build.reference import write_reference

        start = time.monotonic()
        mod = self._module(args["digest"], args["body"])
        args_info = [(kind, dtype, tuple(shape)) for kind, dtype, shape in args["args_info"]]
        try:
            write_reference(mod, args_info, args["seed"], Path(args["out"]))
        except Exception as error:
            raise WorkError(FailureKind.BUILD_ERROR, f"no reference: {one_line(error)}") from None
        return {"seconds": time.monotonic() - start}

    def model(self, args: dict[str, Any]) -> dict[str, Any]:
        from tuner_core.compiler.apply import apply_schedules
        from tuner_core.compiler.executable import build_executable, export_executable

        start = time.monotonic()
        target = self._target(args["target"])
        mod = _checked(load_lifted_module, args["module"])
        try:
            scheduled, applied = apply_schedules(mod, target, args["traces"])
            executable = build_executable(scheduled, target, tuned=applied.tuned, trusted=True)
            export_executable(executable, args["out"])
        except TunerError as error:
            raise WorkError(FailureKind.BUILD_ERROR, str(error)) from None
        seconds = time.monotonic() - start
        return {"seconds": seconds, "coverage": applied.as_dict(), "args_info": _parameters(mod)}

    def _inputs(self, args: dict[str, Any]) -> tuple[tvm.IRModule, Target]:
        return self._module(args["digest"], args["body"]), self._target(args["target"])

    def _module(self, digest: str, body: str) -> tvm.IRModule:
        mod = self._modules.get(digest)
        if mod is None:
            mod = self._modules[digest] = _checked(load_workload, body)
            while len(self._modules) > _MODULES_KEPT:
                self._modules.popitem(last=False)
        self._modules.move_to_end(digest)
        return mod

    def _target(self, target_json: str) -> Target:
        if target_json not in self._targets:
            target = Target(json.loads(target_json))
            try:
                prepare_for_target(target, self._cubin_cache)
            except TunerError as error:
                raise WorkError(FailureKind.BUILD_ERROR, str(error)) from None
            self._targets[target_json] = target
        return self._targets[target_json]

    def _compile(self, mod: tvm.IRModule, target: Target, out: str) -> str:
        """Build it; the suffix that the file has got in place of the output's."""
        try:
            return compile_module(mod, target, Path(out)).suffix
        except SourceTooLargeError as error:
            raise WorkError(FailureKind.BUILD_TIMEOUT, str(error)) from None
        except Exception as error:  # TVM, LLVM, NVRTC and the linker have no common base
            out_of_memory = isinstance(error, MemoryError) or "bad_alloc" in str(error)
            kind = FailureKind.OUT_OF_MEMORY if out_of_memory else FailureKind.BUILD_ERROR
            raise WorkError(kind, one_line(error)) from None


def _parameters(mod: tvm.IRModule) -> list[tuple[str, str, list[int]]]:
    """Types and shapes of the parameters of ``main``."""
    parameters = []
    for variable in mod["main"].params:
        shape = getattr(variable.ty, "shape", None)
        if shape is None or any(not hasattr(extent, "value") for extent in shape):
            raise WorkError(FailureKind.BUILD_ERROR, f"{variable.name_hint} is not a tensor of known shape")
        parameters.append(("TENSOR", str(variable.ty.dtype), [int(extent) for extent in shape]))
    return parameters


def _checked(load: Callable[[str], tvm.IRModule], text: str) -> tvm.IRModule:
    """A module from IR that a client sent."""
    try:
        return load(text)
    except UsageError as error:
        raise WorkError(FailureKind.BUILD_ERROR, str(error)) from None


def main(sock: socket.socket, config: dict[str, Any]) -> None:
    """Serve until the peer closes.

    Args:
        sock: Connected stream socket.
        config: ``cubin_cache``: directory for compiled GPU kernels, or null.
    """
    limit_resources()
    keep_freed_memory()
    builder = _Builder(config)
    serve(
        sock,
        {
            "build": builder.build,
            "fallback": builder.fallback,
            "reference": builder.reference,
            "model": builder.model,
        },
        idle=release_freed_memory,
    )
