"""The zero-trial schedule for CPUs: parallel outer loops, register tiles, a vectorised inner loop.

Every block is scheduled by the first of several recipes that is legal for it, best first; a recipe that fails leaves no
mark. All splits use divisors, so no predicate keeps the inner loops from becoming vectors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tuner_core.compiler.access import BlockAccess, Packable, analyse_block

if TYPE_CHECKING:
    from tvm.ir import IRModule
    from tvm.s_tir import Schedule
    from tvm.target import Target

# Below these, waking the other threads costs more than it saves (about 10 us a launch).
_MIN_PARALLEL_ELEMENTS = 131072
_MIN_PARALLEL_OPERATIONS = 32768
_MAX_ROWS = 14
_SMALL_WINDOW = 32  # reductions that LLVM unrolls completely, and then vectorises the loop around them
_MIN_USES_TO_PACK = 128  # a weight must be used so often for its copy in another layout to pay
_MIN_USES_TO_PACK_AT_ALL = 16  # the same where nothing else can be vectorised


def schedule_cpu(mod: IRModule, target: Target) -> Schedule:
    """Schedule one workload for a CPU; see :func:`tuner_core.compiler.fallback.fallback_schedule`.

    Args:
        mod: A normalised module.
        target: An llvm target; its vector width decides the tile sizes.
    """
    from tvm.s_tir import Schedule

    registers = vector_registers(target)
    schedule = Schedule(mod, error_render_level="fast")
    try:
        schedule = _first_legal(schedule, [_inline_producers, _keep])
        root = schedule.get_sblock("root", func_name="main")
        for block in schedule.get_child_blocks(root):
            schedule = _schedule_block(schedule, block, registers)
    except Exception:  # whatever an unusual operator provokes: unscheduled loops are slow, but right
        return Schedule(mod)
    return schedule


@dataclass(frozen=True)
class VectorRegisters:
    """``count`` registers of ``bits`` bits."""

    bits: int
    count: int

    def lanes(self, element_bits: int) -> int:
        """Elements per register."""
        return max(1, self.bits // max(8, element_bits))


def vector_registers(target: Target) -> VectorRegisters:
    """Vector registers of an llvm target, by the features that LLVM knows for its ``mcpu`` and ``mattr``."""
    from tvm.target import codegen

    def has(feature: str) -> bool:
        try:
            return bool(codegen.target_has_features([feature], target))
        except Exception:  # an architecture without that feature's name
            return False

    if has("avx512f"):
        return VectorRegisters(512, 32)
    if has("avx2") or has("avx"):
        return VectorRegisters(256, 16)
    return VectorRegisters(128, 16)


def _keep(schedule: Schedule) -> None:
    return None


def _first_legal(schedule: Schedule, recipes: Sequence[Callable[[Schedule], None]]) -> Schedule:
    for recipe in recipes:
        attempt = schedule.copy()
        try:
            recipe(attempt)
        except Exception:  # ScheduleError, or an analysis that does not hold for this block
            continue
        return attempt
    return schedule


def _inline_producers(schedule: Schedule) -> None:
    """Inline what is cheap to compute again; padding in front of a reduction stays a pass of its own."""
    root = schedule.get_sblock("root", func_name="main")
    for block in schedule.get_child_blocks(root):
        access = analyse_block(schedule, block)
        if access.is_reduction:
            continue
        consumers = schedule.get_consumers(block)
        if not consumers:
            continue
        feeds_reduction = any(analyse_block(schedule, consumer).is_reduction for consumer in consumers)
        if (feeds_reduction and access.costs_to_repeat) or (len(consumers) > 1 and access.costs_to_repeat):
            continue
        attempt = schedule.copy()
        try:
            attempt.compute_inline(block)
        except Exception:  # an output, or a block that is not inlinable: it stays
            continue
        schedule.compute_inline(block)


def _schedule_block(schedule: Schedule, block: Any, registers: VectorRegisters) -> Schedule:
    try:
        access = analyse_block(schedule, block)
    except Exception:  # removed meanwhile: moved into the tile of its producer
        return schedule
    if not access.static:
        return _first_legal(schedule, [lambda sch: _parallel_outer(sch, block, access)])
    if access.is_reduction:
        return _first_legal(
            schedule,
            [*_reduction_recipes(block, access, registers), lambda sch: _parallel_outer(sch, block, access)],
        )
    if _already_placed(schedule, block):
        return schedule
    return _first_legal(
        schedule,
        [lambda sch: _map(sch, block, access, registers), lambda sch: _parallel_outer(sch, block, access)],
    )


def _reduction_recipes(
    block: Any, access: BlockAccess, registers: VectorRegisters
) -> Iterator[Callable[[Schedule], None]]:
    lanes = registers.lanes(access.element_bits)
    plans = []
    vector = access.vector_axis(max_stride=1)
    width = _vector_width(access.extents[vector], lanes) if vector is not None else 1
    if len(access.reads) < 2 and (access.reduction_size <= _SMALL_WINDOW or vector is not None):
        return  # pooling: the naive loops, in parallel, are vectorised by LLVM
    packed = access.packable(min_uses=_MIN_USES_TO_PACK if width > 1 else _MIN_USES_TO_PACK_AT_ALL)
    if packed is not None and width < 0.7 * lanes:
        channels = _vector_width(access.extents[packed.axis], lanes)
        if channels >= lanes // 2:
            plans.append(_Tile(vector=packed.axis, width=channels, packed=packed))
    if width > 1 and (plans or access.reduction_size > _SMALL_WINDOW):
        plans.append(_Tile(vector=vector, width=width))
    elif access.reduction_size > _SMALL_WINDOW:
        plans.append(_Tile(vector=None, width=1))
    for plan in plans:
        for epilogue in (True, False):
            yield partial(
                _tile_reduction, block=block, access=access, registers=registers, tile=plan, epilogue=epilogue
            )


@dataclass(frozen=True)
class _Tile:
    """What of a reduction's output is kept in registers: ``width`` elements of loop ``vector``, times some rows."""

    vector: int | None
    width: int
    packed: Packable | None = None


def _already_placed(schedule: Schedule, block: Any) -> bool:
    from tvm.tirx import ForKind

    return any(schedule.get(loop).kind != ForKind.SERIAL for loop in schedule.get_loops(block))


def _parallel_outer(schedule: Schedule, block: Any, access: BlockAccess) -> None:
    """Parallel outer loops; the innermost spatial loop stays as it is, for LLVM to vectorise."""
    loops = schedule.get_loops(block)
    spatial = list(itertools.takewhile(lambda axis: access.spatial[axis], range(len(loops))))
    wide = [axis for axis in spatial if access.extents[axis] != 1]
    outer = [axis for axis in spatial if axis < wide[-1]] if len(wide) > 1 else spatial
    least = _MIN_PARALLEL_OPERATIONS if access.is_reduction else _MIN_PARALLEL_ELEMENTS
    if outer and access.work >= least:
        schedule.parallel(schedule.fuse(*(loops[axis] for axis in outer)))


def _map(schedule: Schedule, block: Any, access: BlockAccess, registers: VectorRegisters) -> None:
    """A block without reduction: the innermost loop that writes consecutive elements becomes vectors.

    A loop that a branch depends on stays as it is: TVM takes vectors of branches apart, LLVM does not.
    """
    loops = schedule.get_loops(block)
    lanes = registers.lanes(access.element_bits)
    inner = access.vector_axis(max_stride=1)
    width = _vector_width(access.extents[inner], lanes) if inner is not None and inner not in access.branch_axes else 1
    if inner is None or width < max(2, lanes // 2):
        _parallel_outer(schedule, block, access)
        return
    split_outer, split_inner = schedule.split(loops[inner], [None, width])
    outer = [*loops[:inner], split_outer, *loops[inner + 1 :]]
    schedule.reorder(*outer, split_inner)
    schedule.vectorize(split_inner)
    fused = schedule.fuse(*outer)
    if access.work >= _MIN_PARALLEL_ELEMENTS:
        schedule.parallel(fused)


def _tile_reduction(
    schedule: Schedule, block: Any, access: BlockAccess, registers: VectorRegisters, tile: _Tile, epilogue: bool
) -> None:
    """Accumulate a tile of the output in registers: [outer spatial | reduction | rows, unrolled | vector]."""
    consumers = schedule.get_consumers(block)
    if epilogue:
        if len(consumers) != 1:
            raise ValueError("not a single consumer")
        last = consumers[0]
        after = analyse_block(schedule, last)
        outputs = tuple(extent for extent, is_spatial in zip(access.extents, access.spatial, strict=True) if is_spatial)
        if after.is_reduction or after.extents != outputs:
            raise ValueError("the consumer is not element-wise")
        schedule.set_scope(block, 0, "local")
    else:
        last = schedule.cache_write(block, 0, "local")
    if tile.packed is not None:
        _pack(schedule, block, tile)

    loops = schedule.get_loops(block)
    rows = _rows(access, tile, registers)
    outer, reduction, row_loops, vector_loops = [], [], [], []
    for axis, loop in enumerate(loops):
        if not access.spatial[axis]:
            reduction.append(loop)
        elif axis == tile.vector:
            split_outer, split_inner = schedule.split(loop, [None, tile.width])
            outer.append(split_outer)
            vector_loops.append(split_inner)
        elif rows.get(axis, 1) > 1:
            split_outer, split_inner = schedule.split(loop, [None, rows[axis]])
            outer.append(split_outer)
            row_loops.append(split_inner)
        else:
            outer.append(loop)
    schedule.reorder(*outer, *reduction, *row_loops, *vector_loops)
    fused = schedule.fuse(*outer)
    schedule.reverse_compute_at(last, fused)
    if access.work >= _MIN_PARALLEL_OPERATIONS:
        schedule.parallel(fused)
    for loop in vector_loops:
        schedule.vectorize(loop)
    for loop in row_loops:
        schedule.unroll(loop)
    schedule.decompose_reduction(block, reduction[0])
    if tile.packed is None:
        _vectorise_copy(schedule, last, tile.width)


def _rows(access: BlockAccess, tile: _Tile, registers: VectorRegisters) -> dict[int, int]:
    """Unrolled iterations per loop: as many accumulators as registers allow, on the loops that reuse most."""
    lanes = registers.lanes(access.element_bits)
    budget = max(1, min(_MAX_ROWS, (registers.count - 2) // -(-tile.width // lanes)))
    rows: dict[int, int] = {}
    for axis in access.row_axes(excluding=tile.vector, with_vector=tile.packed is not None):
        factor = _largest_divisor(access.extents[axis], budget)
        if factor > 1:
            rows[axis] = factor
            budget //= factor
    return rows


def _pack(schedule: Schedule, block: Any, tile: _Tile) -> None:
    """Copy the weights so that the vector loop reads consecutive elements."""
    packed, width = tile.packed, tile.width
    if packed is None:
        return
    copy = schedule.cache_read(block, packed.read, "global")
    dim = packed.dim

    def tiled(*indices: Any) -> list[Any]:
        others = [index for position, index in enumerate(indices) if position != dim]
        return [indices[dim] // width, *others, indices[dim] % width]

    def vector_last(*indices: Any) -> list[Any]:
        others = [index for position, index in enumerate(indices) if position != packed.output_dim]
        return [*others, indices[packed.output_dim]]

    schedule.transform_layout(block, ("read", packed.read), tiled)
    schedule.transform_layout(block, ("write", 0), vector_last)
    loops = schedule.get_loops(copy)
    split_outer, split_inner = schedule.split(loops[dim], [None, width])
    others = [loop for position, loop in enumerate(loops) if position != dim]
    schedule.reorder(split_outer, *others, split_inner)
    schedule.parallel(split_outer)


def _vectorise_copy(schedule: Schedule, block: Any, width: int) -> None:
    loops = schedule.get_loops(block)
    if width > 1 and len(loops) > 1 and int(schedule.get(loops[-1]).extent) == width:
        schedule.vectorize(loops[-1])


def _vector_width(extent: int, lanes: int) -> int:
    """The largest divisor of ``extent`` that one register holds: LLVM handles odd vectors beyond that badly."""
    return _largest_divisor(extent, lanes)


def _largest_divisor(extent: int, most: int) -> int:
    return max(divisor for divisor in range(1, max(1, min(extent, most)) + 1) if extent % divisor == 0)
