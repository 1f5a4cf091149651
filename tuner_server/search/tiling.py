"""Which factor of which sampled tile each loop of a trace runs over, and which loops become threads or blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from tuner_server.search.space import DesignSpace, Point

SPATIAL_LEVELS = 5  # of MetaSchedule's tiling for GPUs, SSSRRSRS; reduction loops have fewer

Place = tuple[int, int]
"""Index of a knob, and which of its factors."""


def tiled_loops(space: DesignSpace, instructions: Sequence[Sequence[Any]]) -> Iterator[tuple[str, Place]]:
    """Loops that are split by sampled factors, with the place of each one's factor.

    Args:
        space: The space.
        instructions: Its trace's instructions as parsed JSON.
    """
    place_of_factor = {
        factor: (index, level)
        for index, knob in enumerate(space.knobs)
        if knob.levels
        for level, factor in enumerate(instructions[knob.position][3])
    }
    for kind, inputs, _attrs, outputs in instructions:
        if kind != "Split":
            continue
        for loop, factor in zip(outputs, inputs[1:], strict=True):
            if isinstance(factor, str) and factor in place_of_factor:
                yield loop, place_of_factor[factor]


def bound_loops(instructions: Sequence[Sequence[Any]]) -> dict[str, str]:
    """Loops that become blocks or threads, virtual ones too, with what they are bound to, seen through ``Fuse``."""
    bound = {str(inputs[0]): str(attrs[0]) for kind, inputs, attrs, _ in instructions if kind == "Bind"}
    for kind, inputs, _attrs, outputs in reversed(instructions):
        if kind == "Fuse" and outputs[0] in bound:
            bound.update({str(loop): bound[outputs[0]] for loop in inputs})
    return bound


def iterations(point: Point, places: Sequence[Place]) -> int:
    """Of the loops at these places together."""
    factors = [(point[index], level) for index, level in places]
    return math.prod(factor[level] for factor, level in factors if isinstance(factor, tuple))
