"""Argument buffers on the device, kept from one measurement to the next: candidates of a task all take the same."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import tvm

from tuner_server.measure.inputs import ArgsInfo, fill_pattern, numpy_dtype


class ArgumentCache:
    """Least recently used sets of arguments go first.

    Args:
        device: TVM device.
        limit_bytes: Bytes to keep at most; a single larger set is served, but not kept beside others.
        memory_bytes: A set that needs more than that is refused; 0: none is.
    """

    def __init__(self, device: Any, limit_bytes: int, memory_bytes: int = 0) -> None:
        self._device = device
        self._limit_bytes = limit_bytes
        self._memory_bytes = memory_bytes
        self._sets: OrderedDict[str, tuple[list[Any], int]] = OrderedDict()

    @property
    def held_bytes(self) -> int:
        """Bytes in all sets."""
        return sum(size for _, size in self._sets.values())

    def get(self, args_info: ArgsInfo) -> list[Any]:
        """Tensors that fit; their contents are valid for any operator.

        Raises:
            MemoryError: They need more than the worker may use.
            Exception: Whatever the device raises when it has no memory left.
        """
        key = repr(args_info)
        if key in self._sets:
            self._sets.move_to_end(key)
            return self._sets[key][0]
        size = self.check(args_info)
        while self._sets and self.held_bytes + size > self._limit_bytes:
            self._sets.popitem(last=False)
        tensors = [tvm.runtime.tensor(fill_pattern(dtype, shape), self._device) for _, dtype, shape in args_info]
        self._sets[key] = (tensors, size)
        return tensors

    def check(self, args_info: ArgsInfo) -> int:
        """Bytes that arguments need.

        Raises:
            MemoryError: More than the worker may use.
        """
        size = sum(math.prod(shape) * numpy_dtype(dtype).itemsize for _, dtype, shape in args_info)
        if self._memory_bytes and size > self._memory_bytes:
            raise MemoryError(f"the arguments need {size >> 20} MiB, a worker may use {self._memory_bytes >> 20} MiB")
        return size

    def clear(self) -> None:
        """Free everything."""
        self._sets.clear()
