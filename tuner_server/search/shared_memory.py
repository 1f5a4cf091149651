"""How much shared memory a point asks for, by arithmetic on its decisions.

A multi-level tiling copies what a block of threads reads in one step of the outer reduction loops to shared memory.
Which part of a buffer that is follows from the tile factors of the loops inside that step: an index ``2 * h + r`` spans
``2 * (tile(h) - 1) + tile(r)`` elements. Most random points ask for more than a block has, and to find that out by
replaying and lowering them costs 20 to 60 ms each.

Sketches with tensor cores also pass their output through shared memory, when the inputs are not needed any more: the
larger one of the two counts (MergeSharedMemoryAllocations, at best). A software pipeline keeps one version of the
inputs for each of its stages, and has nothing to overlap when its loop runs once: TVM cannot lower that. What cannot
be followed counts as nothing, so that a point is refused only where it surely asks for too much.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tuner_server.search.space import DesignSpace, Point
from tuner_server.search.tiling import SPATIAL_LEVELS, Place, bound_loops, iterations

STAGES = "software_pipeline_stage"
"""Annotation of a loop whose blocks overlap: the stage of each."""
_SCOPE = "shared"
_DYNAMIC_SCOPE = "shared.dyn"


@dataclass(frozen=True)
class Span:
    """What a block accesses along one dimension of a buffer.

    Attributes:
        elements: By one instance of the block.
        strides: For each loop of the block, by how many elements its next iteration moves on; None: unknown.
        extent: Of the buffer, which no tile exceeds.
    """

    elements: int
    strides: tuple[int, ...] | None
    extent: int


@dataclass(frozen=True)
class Access:
    """A buffer that a block reads or writes.

    Attributes:
        value_bytes: Size of an element.
        spans: One per dimension.
    """

    value_bytes: int
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class BlockAccesses:
    """What a tiled block reads, in the order in which ``CacheRead`` counts, and what it writes."""

    reads: tuple[Access, ...]
    write: Access


@dataclass(frozen=True)
class _Copy:
    """A tile of a buffer in shared memory.

    Attributes:
        access: The buffer.
        inside: For each loop of the block, the places (knob, level) of the factors that one tile covers.
        align: Dimension whose stride is padded, factor and offset; None: not padded.
        versions: How many tiles are there at a time.
    """

    access: Access
    inside: tuple[tuple[Place, ...], ...]
    align: tuple[int, int, int] | None = None
    versions: int = 1

    def shape(self, point: Point) -> list[int]:
        """Elements along each dimension; one of none where that is unknown."""
        tiles = [iterations(point, places) for places in self.inside]
        shape = []
        for span in self.access.spans:
            if span.strides is None:
                return [0]
            reach = span.elements + sum(stride * (tile - 1) for stride, tile in zip(span.strides, tiles, strict=True))
            shape.append(min(reach, span.extent))
        return shape

    def size(self, point: Point) -> int:
        """Bytes."""
        shape = self.shape(point)
        if self.align is not None:
            dim, factor, offset = self.align
            inner = math.prod(shape[dim + 1 :])
            padded = inner + (offset - inner) % factor
            return math.prod(shape[: dim + 1]) * padded * self.access.value_bytes * self.versions
        return math.prod(shape) * self.access.value_bytes * self.versions


class SharedMemoryLimits:
    """Checks the points of one space against the shared memory of a GPU target.

    Args:
        space: The space.
        instructions: Its trace's instructions as parsed JSON.
        accesses: Of the blocks that are tiled, by their names in the trace.
        limit_bytes: Shared memory that a block can have.
    """

    of = "shared memory"

    def __init__(
        self,
        space: DesignSpace,
        instructions: Sequence[Sequence[Any]],
        accesses: Mapping[str, BlockAccesses],
        limit_bytes: int,
    ) -> None:
        self._limit_bytes = limit_bytes
        self._loops = _TiledLoops(space, instructions)
        self._inputs: dict[str, _Copy] = {}
        self._outputs: list[tuple[int, tuple[Place, ...]]] = []
        self._dynamic = False
        self._pipelined: list[tuple[Place, ...]] = []
        copies: dict[str, _Copy] = {}
        read_from: dict[str, str] = {}
        for kind, inputs, attrs, outputs in instructions:
            if kind in ("CacheRead", "CacheWrite") and str(attrs[1]).startswith(_SCOPE) and inputs[0] in accesses:
                self._dynamic = self._dynamic or attrs[1] == _DYNAMIC_SCOPE
                if kind == "CacheWrite":
                    self._add_output(accesses[inputs[0]].write)
                elif attrs[0] < len(accesses[inputs[0]].reads):
                    copies[outputs[0]] = _Copy(accesses[inputs[0]].reads[attrs[0]], ())
                    read_from[outputs[0]] = inputs[0]
            elif kind == "ComputeAt" and inputs[0] in copies:
                inside = self._loops.inside(read_from[inputs[0]], inputs[1])
                copies[inputs[0]] = replace(copies[inputs[0]], inside=inside)
            elif kind == "StorageAlign" and inputs[0] in copies:
                dim = attrs[1] % len(copies[inputs[0]].access.spans)
                copies[inputs[0]] = replace(copies[inputs[0]], align=(dim, attrs[2], attrs[3]))
            elif kind == "Annotate" and attrs == [STAGES]:
                versions = max(inputs[1]) + 1
                copies = {name: replace(copy, versions=versions) for name, copy in copies.items()}
                self._pipelined.append(self._loops.places(inputs[0]))
        self._inputs = {name: copy for name, copy in copies.items() if copy.inside}

    def _add_output(self, write: Access) -> None:
        """The write-back of tensor cores: all warps' tiles along the last spatial loop, one row of them at a time."""
        spatial = self._loops.spatial
        threads = [place for knob in spatial for place in self._loops.threads if place[0] == knob]
        fragment = math.prod(span.elements for span in write.spans) * write.value_bytes
        unrolled = [(spatial[-1], level) for level in (SPATIAL_LEVELS - 2, SPATIAL_LEVELS - 1)] if spatial else []
        self._outputs.append((fragment, tuple(threads + unrolled)))

    def size(self, point: Point) -> int:
        """Bytes that a block of threads needs at least."""
        inputs = sum(copy.size(point) for copy in self._inputs.values())
        outputs = sum(fragment * iterations(point, places) for fragment, places in self._outputs)
        return max(inputs, outputs) if self._dynamic else inputs + outputs

    @property
    def copies(self) -> int:
        """Number of inputs that are copied to shared memory."""
        return len(self._inputs)

    def fetched(self, point: Point) -> Iterator[tuple[str, int]]:
        """The blocks that copy inputs, with the elements that a block of threads copies at a time."""
        for name, copy in self._inputs.items():
            yield name, math.prod(copy.shape(point))

    def allow(self, point: Point) -> bool:
        """Whether the point's tiles fit, and its pipeline has something to overlap."""
        if any(iterations(point, places) < 2 for places in self._pipelined if places):
            return False
        return self.size(point) <= self._limit_bytes


class _TiledLoops:
    """Where the loops of a trace come from: which factor of which knob each of them is."""

    def __init__(self, space: DesignSpace, instructions: Sequence[Sequence[Any]]) -> None:
        knobs = {instructions[knob.position][1][0]: index for index, knob in enumerate(space.knobs) if knob.levels}
        self.spatial = [index for index, knob in enumerate(space.knobs) if knob.levels == SPATIAL_LEVELS]
        self._knobs_of_block: dict[str, list[int | None]] = {}
        self._place: dict[str, Place] = {}
        self._parts: dict[str, list[str]] = {}
        self._order: dict[str, int] = {}
        self._bound = bound_loops(instructions)
        for kind, inputs, _attrs, outputs in instructions:
            if kind == "GetLoops" and any(loop in knobs for loop in outputs):
                self._knobs_of_block[inputs[0]] = [knobs.get(loop) for loop in outputs]  # None: of one iteration
            elif kind == "Split" and inputs[0] in knobs:
                self._place.update({loop: (knobs[inputs[0]], level) for level, loop in enumerate(outputs)})
            elif kind == "Reorder" and all(loop in self._place for loop in inputs):
                self._order = {loop: position for position, loop in enumerate(inputs)}
            elif kind == "Fuse":
                self._parts[outputs[0]] = list(inputs)
        self.threads = [place for loop, place in self._place.items() if self._bound.get(loop, "").startswith("thread")]

    def places(self, loop: str) -> tuple[Place, ...]:
        """The factors that a loop, perhaps a fused one, runs over; none when one of them is unknown."""
        parts = self._parts.get(loop, [loop])
        return tuple(self._place[part] for part in parts) if all(part in self._place for part in parts) else ()

    def inside(self, block: str, loop: str) -> tuple[tuple[Place, ...], ...]:
        """For each loop of a block, its factors that lie inside a loop, those of all threads included."""
        if loop not in self._order or block not in self._knobs_of_block:
            return ()

        def covered(name: str) -> bool:
            if name in self._bound:
                return not self._bound[name].startswith("blockIdx")
            return self._order.get(name, -1) > self._order[loop]

        return tuple(
            tuple(place for name, place in self._place.items() if place[0] == knob and covered(name))
            for knob in self._knobs_of_block[block]
        )
