"""How many statements a point's kernel surely has, by arithmetic on its decisions.

A build of many statements is refused (``MAX_STATEMENTS`` of :mod:`tuner_core.compiler.cuda_build`), and costs its user
a trial. TVM unrolls loops from the innermost one outwards, as long as all of it stays below the limit that was sampled
(``UnrollLoop``); virtual threads become statements before that (``InjectVirtualThread``, fewer than 16 of them in any
case). A software pipeline repeats what is inside its loop: once for each stage before the last, and once as the loop.

Counted are the accumulators' first values, what is added to them, their writing back, and what each thread copies to
shared memory, with one statement for each access: kernels have more. What it takes to compute the indices of vectors
that are no ramps, or to guard what is read of a padded image, is not counted, and most of what is over the limit all
the same consists of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from tuner_core.compiler.cuda_build import MAX_STATEMENTS
from tuner_server.search.build_cost import unroll_limit
from tuner_server.search.shared_memory import STAGES, SharedMemoryLimits
from tuner_server.search.space import DesignSpace, Point
from tuner_server.search.tiling import SPATIAL_LEVELS, Place, bound_loops, iterations, tiled_loops

_FETCH = "meta_schedule.cooperative_fetch"
_WARPS = "warp_execution"
_UNROLLED_THREADS = 15  # virtual ones


class StatementLimits:
    """Checks the points of one space against the statements that a build may have.

    Args:
        space: The space.
        instructions: Its trace's instructions as parsed JSON.
        shared_memory: What the points of the space copy to shared memory.
        warp_size: Threads of a warp.
        limit: The largest number of statements.
    """

    of = "statements"

    def __init__(
        self,
        space: DesignSpace,
        instructions: Sequence[Sequence[Any]],
        shared_memory: SharedMemoryLimits,
        warp_size: int = 32,
        limit: int = MAX_STATEMENTS,
    ) -> None:
        self._limit = limit
        self._unroll_limit = unroll_limit(space, instructions)
        self._shared_memory = shared_memory
        self._lanes = warp_size if any(one[0] == "Annotate" and one[2] == [_WARPS] for one in instructions) else 1
        self._vectors = dict(_vectors(space, instructions))
        bound, places = bound_loops(instructions), dict(tiled_loops(space, instructions))
        self._virtual = [place for loop, place in places.items() if bound.get(loop, "").startswith("vthread")]
        self._threads = [place for loop, place in places.items() if bound.get(loop, "").startswith("threadIdx")]
        order = next((one[1] for one in instructions if one[0] == "Reorder" and set(one[1]) >= set(places)), ())
        free = [places[loop] for loop in order if loop in places and loop not in bound]
        self._outer = [place for place in free if space.knobs[place[0]].levels != SPATIAL_LEVELS and place[1] == 0]
        self._added = [place for place in free if place not in self._outer]
        self._private = [place for place in free if space.knobs[place[0]].levels == SPATIAL_LEVELS]
        outermost = {loop for loop, place in places.items() if place in self._outer}
        parts = {one[3][0]: set(one[1]) for one in instructions if one[0] == "Fuse"}
        self._stages = max(
            (
                max(inputs[1])
                for kind, inputs, attrs, _ in instructions
                if kind == "Annotate" and attrs == [STAGES] and parts.get(inputs[0], {inputs[0]}) <= outermost
            ),
            default=0,
        )
        # what is counted below: first values, writing back, and in each stage sums and copies, each up to the limit
        self._harmless = limit // (2 + (1 + shared_memory.copies) * (self._stages + 1))
        if self._harmless < _UNROLLED_THREADS:
            self._harmless = -1

    def at_least(self, point: Point) -> int:
        """Statements that the kernel has, or more."""
        limit = self._unroll_limit(point)
        virtual = iterations(point, self._virtual)
        together = virtual <= max(limit, _UNROLLED_THREADS)
        leaf = virtual if together else 1  # else their loop is the innermost one, and it and all around it stay loops
        first = _unrolled(point, self._private, leaf, limit) if together else 1
        added = _unrolled(point, self._added, leaf, limit) if together else 1
        values = virtual * iterations(point, self._private)
        written = values if values <= limit else leaf
        threads = iterations(point, self._threads) * self._lanes
        fetched = 0
        for name, elements in self._shared_memory.fetched(point):
            times = math.ceil(elements / (threads * self._vector(name, point)))
            fetched += times if times <= limit else 1
        return first + written + (added + fetched) * min(iterations(point, self._outer), self._stages + 1)

    def _vector(self, name: str, point: Point) -> int:
        """Elements that a thread copies at a time."""
        if name not in self._vectors:
            return 1
        index, lengths = self._vectors[name]
        choice = point[index]
        return lengths[choice] if isinstance(choice, int) else 1

    def allow(self, point: Point) -> bool:
        """Whether the point's kernel may be small enough."""
        return self._unroll_limit(point) <= self._harmless or self.at_least(point) <= self._limit


def _unrolled(point: Point, places: Sequence[Place], leaf: int, limit: int) -> int:
    """Statements of a nest of loops, outermost first, around so many statements."""
    steps = leaf
    for index, level in reversed(places):
        factors = point[index]
        factor = factors[level] if isinstance(factors, tuple) else 1
        if factor > 1 and steps * factor > limit:
            return steps
        steps *= factor
    return steps


def _vectors(
    space: DesignSpace, instructions: Sequence[Sequence[Any]]
) -> Iterator[tuple[str, tuple[int, Sequence[int]]]]:
    """Blocks that threads fill together, with the knob of how many elements each copies at a time, and its options."""
    knobs = {instructions[knob.position][3][0]: index for index, knob in enumerate(space.knobs) if knob.options}
    for kind, inputs, attrs, _ in instructions:
        if kind == "Annotate" and attrs == [_FETCH] and inputs[1] in knobs:
            index = knobs[inputs[1]]
            yield inputs[0], (index, [int(length) for length in instructions[space.knobs[index].position][2][0]])
