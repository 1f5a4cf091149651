"""What an operator does with its arguments, read from its IR: which it writes, and which of them it indexes with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ArgumentPlan:
    """How to draw the arguments of one operator.

    Attributes:
        outputs: Positions of the arguments that it writes.
        index_limits: Position of each integer argument whose values are used as indices -> first value that would be
            out of bounds.
    """

    outputs: tuple[int, ...]
    index_limits: Mapping[int, int] = field(default_factory=dict)


def plan_arguments(mod: Any) -> ArgumentPlan:
    """Analyse a workload.

    Values may pass through intermediate buffers (reshapes, casts) before they index. Where an index is a product that
    contains the value, only 0 is surely in bounds.

    Args:
        mod: IRModule with one PrimFunc called ``main``.
    """
    import tvm_ffi
    from tvm import ir, tirx

    function = mod["main"]
    buffers = list(function.params)  # in this TVM a parameter is its buffer
    loads: list[Any] = []
    stores: list[Any] = []
    tvm_ffi.structural_walk(function.body, [(ir.TensorLoad, loads.append), (tirx.BufferStore, stores.append)])

    def loads_in(expression: Any) -> list[Any]:
        found: list[Any] = []
        tvm_ffi.structural_walk(expression, (ir.TensorLoad, found.append))
        return found

    def multiplies(expression: Any) -> bool:
        found: list[Any] = []
        tvm_ffi.structural_walk(expression, (tirx.Mul, found.append))
        return any(loads_in(product) for product in found)

    outputs = tuple(
        position for position, buffer in enumerate(buffers) if any(store.buffer.same_as(buffer) for store in stores)
    )
    flows = [(store.buffer, load.source) for store in stores for load in loads_in(store.value)]
    limits: dict[int, int] = {}
    for access in [(load.source, load.indices) for load in loads] + [(store.buffer, store.indices) for store in stores]:
        for index, extent in zip(access[1], access[0].shape, strict=True):
            for inner in loads_in(index):
                limit = int(extent) if isinstance(extent, tirx.IntImm) and not multiplies(index) else 1
                for position in _origins(inner.source, buffers, flows):
                    limits[position] = min(limit, limits.get(position, limit))
    return ArgumentPlan(outputs, limits)


def _origins(buffer: Any, params: list[Any], flows: list[tuple[Any, Any]]) -> set[int]:
    """Positions of the parameters from which the values of an integer buffer come."""
    seen: list[Any] = []
    pending = [buffer]
    found: set[int] = set()
    while pending:
        current = pending.pop()
        if "int" not in str(current.dtype) or any(current.same_as(other) for other in seen):
            continue
        seen.append(current)
        found.update(position for position, param in enumerate(params) if param.same_as(current))
        pending.extend(source for target, source in flows if target.same_as(current))
    return found
