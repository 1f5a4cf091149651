"""How many values each GPU thread has to keep, by arithmetic on the decisions of a point.

A thread of a multi-level tiling accumulates one value for each iteration of its spatial loops, virtual threads and
unrolled loops included. No thread has more than 255 registers (CUDA C++ Programming Guide, "Compute Capabilities"),
and those of a block share what the multiprocessor has: a point that needs more keeps its accumulators in memory. It is
never the fastest one, but such points take half of the compiler's time where points are drawn at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tuner_server.search.space import DesignSpace, Point
from tuner_server.search.tiling import SPATIAL_LEVELS, Place, bound_loops, iterations, tiled_loops

REGISTERS_PER_THREAD = 255
_REGISTER_BYTES = 4
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
        self._threads: list[Place] = []
        self._private: list[Place] = []
        self._values_per_register = max(1, _REGISTER_BYTES // value_bytes)
        self._registers_per_value = max(1, value_bytes // _REGISTER_BYTES)
        self._per_block = per_block
        bound = bound_loops(instructions)
        for loop, place in tiled_loops(space, instructions):
            if space.knobs[place[0]].levels != SPATIAL_LEVELS:
                continue
            if loop not in bound or bound[loop].startswith(_VIRTUAL):
                self._private.append(place)
            elif bound[loop].startswith("threadIdx"):
                self._threads.append(place)

    def allow(self, point: Point) -> bool:
        """Whether the point's accumulators fit into registers."""
        values = iterations(point, self._private)
        registers = values * self._registers_per_value / self._values_per_register
        limit = min(REGISTERS_PER_THREAD, self._per_block / iterations(point, self._threads))
        return registers <= limit
