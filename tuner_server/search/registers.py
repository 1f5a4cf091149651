"""How many values each GPU thread has to keep, by arithmetic on the decisions of a point.

A thread of a multi-level tiling accumulates one value for each iteration of its spatial loops, virtual threads and
unrolled loops included. No thread has more than 255 registers (CUDA C++ Programming Guide, "Compute Capabilities"),
and those of a block share what the multiprocessor has: a point that needs more keeps its accumulators in memory. It is
never the fastest one, but such points take half of the compiler's time where points are drawn at random.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tuner_server.search.space import DesignSpace, Point

REGISTERS_PER_THREAD = 255
_REGISTER_BYTES = 4
SPATIAL_LEVELS = 5  # of MetaSchedule's tiling for GPUs, SSSRRSRS; reduction loops have fewer
_VIRTUAL = "vthread"


class RegisterLimits:
    """Checks the points of one space against the registers of a GPU target.

    Args:
        space: The space.
        instructions: Its trace's instructions as parsed JSON.
        value_bytes: Size of an accumulated value.
        per_block: Registers that a block can have.
    """

    of = "registers"

    def __init__(
        self, space: DesignSpace, instructions: Sequence[Sequence[Any]], value_bytes: int, per_block: int
    ) -> None:
        self._threads: list[tuple[int, int]] = []
        self._private: list[tuple[int, int]] = []
        self._values_per_register = max(1, _REGISTER_BYTES // value_bytes)
        self._registers_per_value = max(1, value_bytes // _REGISTER_BYTES)
        self._per_block = per_block
        bound = bound_loops(instructions)
        knob_of_factor = {
            output: (index, level)
            for index, knob in enumerate(space.knobs)
            if knob.levels == SPATIAL_LEVELS
            for level, output in enumerate(instructions[knob.position][3])
        }
        for kind, inputs, _attrs, outputs in instructions:
            if kind != "Split":
                continue
            for loop, factor in zip(outputs, inputs[1:], strict=True):
                place = knob_of_factor.get(factor) if isinstance(factor, str) else None
                if place is None:
                    continue
                if loop not in bound or bound[loop].startswith(_VIRTUAL):
                    self._private.append(place)
                elif bound[loop].startswith("threadIdx"):
                    self._threads.append(place)

    def allow(self, point: Point) -> bool:
        """Whether the point's accumulators fit into registers."""
        values = _product(point, self._private)
        registers = values * self._registers_per_value / self._values_per_register
        limit = min(REGISTERS_PER_THREAD, self._per_block / _product(point, self._threads))
        return registers <= limit


def bound_loops(instructions: Sequence[Sequence[Any]]) -> dict[str, str]:
    """Loops that become blocks or threads, virtual ones too, with what they are bound to, seen through ``Fuse``."""
    bound = {str(inputs[0]): str(attrs[0]) for kind, inputs, attrs, _ in instructions if kind == "Bind"}
    for kind, inputs, _attrs, outputs in reversed(instructions):
        if kind == "Fuse" and outputs[0] in bound:
            bound.update({str(loop): bound[outputs[0]] for loop in inputs})
    return bound


def _product(point: Point, places: Sequence[tuple[int, int]]) -> int:
    factors = [point[index] for index, _ in places]
    return math.prod(
        factor[level] for factor, (_, level) in zip(factors, places, strict=True) if isinstance(factor, tuple)
    )
