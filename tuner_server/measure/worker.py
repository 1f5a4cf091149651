"""What runs inside a measurement worker: load what was built, time it, compare its output. It never compiles."""

from __future__ import annotations

import gc
import math
import os
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tvm

from tuner_core.compiler.cuda_libraries import load_tvm_cuda_runtime
from tuner_core.model import FailureKind
from tuner_server.gpu.faults import context_lost, headline
from tuner_server.measure.argument_cache import ArgumentCache
from tuner_server.measure.correctness import compare
from tuner_server.measure.inputs import ArgsInfo, Array, draw_array, load_reference, numpy_dtype, reference_terms
from tuner_server.measure.loaded import Operator, load_library, load_operator
from tuner_server.measure.memory import says_out_of_memory
from tuner_server.measure.models import measure_models
from tuner_server.processes.child import WorkError, one_line, serve
from tuner_server.processes.heap import release_freed_memory

_MARGIN = 1.05  # so that a sample is not shorter than asked for when the calls get faster
_SURELY = 1.25
"""A short sample over the limit by this factor is believed: the full-length one would not bring it under."""
_CACHE_BYTES = 256 << 20
_UNWRITTEN_INTEGER = 113
_Result = TypeVar("_Result")
DEVICE_FAULT = "device_fault"  # the worker's context is gone: restart it


def _calibrate(sample: Callable[[int, int], list[float]], fewest: int, duration_us: float) -> tuple[int, float]:
    """How many calls make a sample of the wanted length.

    TVM finds this out anew for every sample, by samples of growing length, and overshoots by up to 1.6: half of the
    device's time went there. A single call, then a few, come close enough.

    Args:
        sample: Times so many calls so many times; microseconds per call.
        fewest: Calls at least.
        duration_us: Length wanted.

    Returns:
        The number of calls, and the latency in microseconds that the last of these short samples saw.
    """
    (per_call,) = sample(fewest, 1)
    if per_call * fewest >= duration_us:
        return fewest, per_call
    (per_call,) = sample(max(fewest, math.ceil(min(duration_us / 5, 2000.0) / max(per_call, 1e-3))), 1)
    return max(fewest, math.ceil(duration_us * _MARGIN / max(per_call, 1e-3))), per_call


def main(sock: socket.socket, config: dict[str, Any]) -> None:
    """Serve measurements on one device until the peer closes.

    Args:
        sock: Request socket.
        config: ``device``: TVM's name of it, e.g. ``cpu:0``; ``cache_bytes``: argument buffers to keep at most;
            ``memory_bytes``: device memory that arguments may take, 0: no limit.
    """
    worker = Worker(
        config.get("device", "cpu:0"),
        int(config.get("cache_bytes", _CACHE_BYTES)),
        int(config.get("memory_bytes", 0)),
    )
    serve(
        sock,
        {
            "hello": worker.hello,
            "measure": worker.measure,
            "check": worker.check,
            "measure_models": worker.measure_models,
            "cpu_target": cpu_target,
        },
    )


def cpu_target(args: dict[str, Any]) -> dict[str, Any]:
    """Target of this host's processor."""
    from tuner_server.partitions.cpu_target import cpu_target as host_target

    return {"target": host_target(args["cores"])}


class Worker:
    """One device, with the argument buffers that earlier measurements left.

    Args:
        device: TVM's name of the device.
        cache_bytes: Argument buffers to keep at most.
        memory_bytes: Device memory that arguments may take; 0: no limit.
    """

    def __init__(self, device: str, cache_bytes: int = _CACHE_BYTES, memory_bytes: int = 0) -> None:
        kind, _, index = device.partition(":")
        self._kind = kind
        if kind == "cuda":
            load_tvm_cuda_runtime(allow_stub=False)
        self._device = tvm.device(kind, int(index or 0))
        self._cache = ArgumentCache(self._device, cache_bytes, memory_bytes)

    def hello(self, _args: dict[str, Any]) -> dict[str, Any]:
        """What the worker sees: the proof that its share was granted."""
        affinity = sorted(os.sched_getaffinity(0))
        if self._kind == "cpu":
            sm_count, threads = len(affinity), tvm.runtime.num_threads()
        else:
            tvm.runtime.tensor(np.zeros(1, "float32"), self._device)  # makes the context, to which the share is granted
            sm_count, threads = int(self._device.multi_processor_count), 1
        return {"pid": os.getpid(), "sm_count": sm_count, "threads": int(threads), "affinity": affinity}

    def measure(self, args: dict[str, Any]) -> dict[str, Any]:
        """Latency samples of one artifact.

        Args:
            args: ``artifact``, ``args_info``, ``evaluator`` (number, repeat, min_repeat_ms), ``give_up_above_us``.

        Returns:
            ``samples_us``; ``gave_up``: whether a first, perhaps shorter sample was so slow that no other was taken;
            ``device_s``: for how many seconds the candidate itself ran, the untimed call before each sample aside.
        """
        evaluator, limit_us = args["evaluator"], args.get("give_up_above_us")
        number, repeat = int(evaluator["number"]), int(evaluator["repeat"])
        min_repeat_ms = int(evaluator["min_repeat_ms"])
        operator = self._load(args["artifact"])
        arguments = self._attempt(lambda: self._cache.get(args["args_info"]))
        device_s = 0.0

        def sample(number: int, repeat: int) -> list[float]:
            nonlocal device_s
            results = operator.times(arguments, self._device, number, repeat)
            device_s += number * sum(results)
            return [seconds * 1e6 for seconds in results]

        calls, glance_us = self._attempt(lambda: _calibrate(sample, number, min_repeat_ms * 1000.0))
        if limit_us is not None and glance_us > _SURELY * limit_us and math.isfinite(glance_us):
            return {"samples_us": [glance_us], "gave_up": True, "device_s": device_s}
        first = 1 if limit_us is not None else repeat
        samples = self._attempt(lambda: sample(calls, first))
        gave_up = limit_us is not None and samples[0] > limit_us
        if not gave_up and first < repeat:
            samples += self._attempt(lambda: sample(calls, repeat - first))
        if not all(math.isfinite(value) and value > 0 for value in samples):
            raise WorkError(FailureKind.RUN_ERROR, f"the timer returned {samples}")
        return {"samples_us": samples, "gave_up": gave_up, "device_s": device_s}

    def check(self, args: dict[str, Any]) -> dict[str, Any]:
        """Compare an artifact's outputs with a reference.

        Args:
            args: ``artifact``, ``args_info``; ``reference``: an npz of inputs and outputs, or instead
                ``reference_artifact``: another library, run here on the same random inputs, with ``outputs`` = number
                of outputs (the last arguments) and ``seed``.

        Returns:
            ``verdict``, ``max_error`` (None when not finite), ``message``.
        """
        args_info = args["args_info"]
        if args.get("reference"):
            try:
                inputs, expected = load_reference(Path(args["reference"]), args_info)
                terms = reference_terms(Path(args["reference"]))
            except (OSError, ValueError) as error:
                raise WorkError("internal", f"the reference cannot be read: {error}") from None
        else:
            rng = np.random.default_rng(int(args.get("seed", 0)))
            given = args_info[: len(args_info) - int(args.get("outputs", 1))]
            inputs = [draw_array(rng, dtype, shape, index_limit=1) for _kind, dtype, shape in given]
            expected = self._outputs(args["reference_artifact"], args_info, inputs)
            terms = 1
        result = compare(self._outputs(args["artifact"], args_info, inputs), expected, terms=terms)
        max_error = result.max_error if math.isfinite(result.max_error) else None
        return {"verdict": result.verdict, "max_error": max_error, "message": result.message}

    def _outputs(self, artifact: str, args_info: ArgsInfo, inputs: list[Array]) -> list[Array]:
        """Run once. Outputs start as NaN (integers: an odd value), so that one left unwritten shows."""
        operator = self._load(artifact)

        def run() -> list[Array]:
            self._cache.check(args_info)
            blank = [_unwritten(dtype, shape) for _kind, dtype, shape in args_info[len(inputs) :]]
            tensors = [tvm.runtime.tensor(array, self._device) for array in [*inputs, *blank]]
            operator(*tensors)
            self._device.sync()
            return [tensor.numpy() for tensor in tensors[len(inputs) :]]

        return self._attempt(run)

    def measure_models(self, args: dict[str, Any]) -> dict[str, Any]:
        """Latency of two builds of one model, measured in turn, and whether their outputs agree.

        Args:
            args: ``baseline``, ``tuned``: Relax executables; ``args_info`` of their ``main``; ``rounds``, ``budget_s``,
                ``seed``.
        """
        self._cache.clear()
        loaded = [self._attempt(partial(load_library, Path(args[name]))) for name in ("baseline", "tuned")]
        try:
            return self._attempt(
                lambda: measure_models(
                    loaded[0],
                    loaded[1],
                    self._device,
                    args["args_info"],
                    rounds=int(args["rounds"]),
                    budget_s=float(args["budget_s"]),
                    seed=int(args["seed"]),
                    clock=time.perf_counter,
                )
            )
        finally:
            loaded.clear()
            gc.collect()
            release_freed_memory()  # a model's weights can be hundreds of megabytes

    def _load(self, path: str) -> Operator:
        return self._attempt(lambda: load_operator(Path(path)))

    def _attempt(self, action: Callable[[], _Result]) -> _Result:
        """Do something on the device; its errors become kinds of failure."""
        try:
            return action()
        except WorkError:
            raise
        except Exception as error:  # TVM raises RuntimeError, InternalError, MemoryError, ...
            line = one_line(error)
            if isinstance(error, MemoryError) or says_out_of_memory(str(error)):
                self._cache.clear()
                raise WorkError(FailureKind.OUT_OF_MEMORY, line) from None
            if self._kind == "cuda":
                line = headline(str(error))
                if context_lost(str(error)):
                    raise WorkError(DEVICE_FAULT, line) from None
            raise WorkError(FailureKind.RUN_ERROR, line) from None


def _unwritten(dtype: str, shape: tuple[int, ...]) -> Array:
    integer = "int" in dtype or dtype == "bool"
    return np.full(tuple(shape), _UNWRITTEN_INTEGER if integer else np.nan, numpy_dtype(dtype))
