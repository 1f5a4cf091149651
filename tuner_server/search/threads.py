"""How many GPU threads a point asks for, by arithmetic on its decisions.

Applying a trace and lowering it to be told by VerifyGPUCode that a block has 4,000 threads costs 10 ms; multiplying the
tile factors that are bound to ``threadIdx.x`` costs microseconds. Follows ``Split``, ``Fuse`` and ``Bind``; what it
cannot follow it lets pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tuner_server.search.space import DesignSpace, Point

_LOW = "meta_schedule.thread_extent_low_inclusive"
_HIGH = "meta_schedule.thread_extent_high_inclusive"
_WARPS = "warp_execution"  # tensor cores: what is bound are warps; their lanes become a dimension of their own later


class ThreadLimits:
    """Checks the points of one space against the limits of a GPU target.

    Args:
        space: The space.
        instructions: Its trace's instructions as parsed JSON.
        max_threads: Largest number of threads of a block; 0: not a GPU, every point passes.
        warp_size: Threads of a warp.
    """

    of = "threads"

    def __init__(
        self, space: DesignSpace, instructions: Sequence[Sequence[Any]], max_threads: int, warp_size: int = 32
    ) -> None:
        self._knob_index = {knob.position: index for index, knob in enumerate(space.knobs)}
        self._max_threads = max_threads
        self._low = self._high = 0
        self._lanes = 1
        self._steps: list[tuple[int, Sequence[Any]]] = []
        for position, instruction in enumerate(instructions):
            kind, inputs, attrs, _outputs = instruction
            if kind in ("SamplePerfectTile", "SampleCategorical", "Split", "Fuse", "Bind"):
                self._steps.append((position, instruction))
            elif kind == "Annotate" and attrs == [_LOW]:
                self._low = int(inputs[1])
            elif kind == "Annotate" and attrs == [_HIGH]:
                self._high = int(inputs[1])
            elif kind == "Annotate" and attrs == [_WARPS]:
                self._lanes = warp_size
        self._binds = any(step[0] == "Bind" for _, step in self._steps)

    def allow(self, point: Point) -> bool:
        """Whether the point is not surely outside the limits."""
        if not self._max_threads or not self._binds:
            return True
        extents: dict[str, int] = {}
        block: dict[str, int] = {}
        for position, (kind, inputs, attrs, outputs) in self._steps:
            if kind == "SamplePerfectTile":
                tile = point[self._knob_index[position]]
                extents.update(zip(outputs, tile, strict=True))  # type: ignore[arg-type]
            elif kind == "SampleCategorical":
                extents[outputs[0]] = int(attrs[0][point[self._knob_index[position]]])
            elif kind == "Split":
                for loop, factor in zip(outputs, inputs[1:], strict=True):
                    if (extent := _extent(factor, extents)) is not None:
                        extents[loop] = extent
            elif kind == "Fuse":
                parts = [extent for loop in inputs if (extent := _extent(loop, extents)) is not None]
                if len(parts) == len(inputs):
                    extents[outputs[0]] = math.prod(parts)
            elif attrs[0].startswith("threadIdx") and (extent := _extent(inputs[0], extents)) is not None:
                block[attrs[0]] = max(extent, block.get(attrs[0], 1))
        if not block:
            return True
        threads = math.prod(block.values()) * self._lanes
        return max(1, self._low) <= threads <= min(self._max_threads, self._high or self._max_threads)


def _extent(value: Any, extents: Mapping[str, int]) -> int | None:
    if isinstance(value, int):
        return value
    return extents.get(value) if isinstance(value, str) else None
