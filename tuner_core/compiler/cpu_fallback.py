"""The zero-trial schedule for CPUs: parallel outer loops, register tiles, a vectorised inner loop.

Every block is scheduled by the first of several recipes that is legal for it, best first; a recipe that fails leaves no
mark. All splits use divisors, so no predicate keeps the inner loops from becoming vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tuner_core.compiler.access import BlockAccess, analyse_block

if TYPE_CHECKING:
    from tvm.ir import IRModule
    from tvm.s_tir import Schedule
    from tvm.target import Target

_MIN_PARALLEL_WORK = 16384  # scalar operations below which waking threads costs more than they save
_MAX_ROWS = 8


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
            [
                lambda sch: _tile_reduction(sch, block, access, registers, epilogue=True),
                lambda sch: _tile_reduction(sch, block, access, registers, epilogue=False),
                lambda sch: _parallel_outer(sch, block, access),
            ],
        )
    if _already_placed(schedule, block):
        return schedule
    return _first_legal(
        schedule,
        [lambda sch: _map(sch, block, access, registers), lambda sch: _parallel_outer(sch, block, access)],
    )


def _already_placed(schedule: Schedule, block: Any) -> bool:
    from tvm.tirx import ForKind

    return any(schedule.get(loop).kind != ForKind.SERIAL for loop in schedule.get_loops(block))


def _parallel_outer(schedule: Schedule, block: Any, access: BlockAccess) -> None:
    loops = schedule.get_loops(block)
    spatial = []
    for loop, is_spatial in zip(loops, access.spatial, strict=True):
        if not is_spatial:
            break
        spatial.append(loop)
    if spatial and access.work >= _MIN_PARALLEL_WORK:
        schedule.parallel(schedule.fuse(*spatial))


def _map(schedule: Schedule, block: Any, access: BlockAccess, registers: VectorRegisters) -> None:
    """A block without reduction: the innermost loop that writes consecutive elements becomes vectors."""
    loops = schedule.get_loops(block)
    lanes = registers.lanes(access.element_bits)
    inner = access.vector_axis(max_stride=1)
    outer = list(loops)
    if inner is not None:
        width = _vector_width(access.extents[inner], 4 * lanes, lanes)
        if width > 1:
            split_outer, split_inner = schedule.split(loops[inner], [None, width])
            outer = [*loops[:inner], split_outer, *loops[inner + 1 :]]
            schedule.reorder(*outer, split_inner)
            schedule.vectorize(split_inner)
    fused = schedule.fuse(*outer)
    if access.work >= _MIN_PARALLEL_WORK:
        schedule.parallel(fused)


def _tile_reduction(
    schedule: Schedule, block: Any, access: BlockAccess, registers: VectorRegisters, *, epilogue: bool
) -> None:
    """Accumulate a tile of the output in registers: [outer spatial | reduction | rows, unrolled | vector]."""
    consumers = schedule.get_consumers(block)
    if epilogue and len(consumers) != 1:
        raise ValueError("not a single consumer")
    if epilogue:
        last = consumers[0]
        after = analyse_block(schedule, last)
        if after.is_reduction or after.extents != tuple(e for e, s in zip(access.extents, access.spatial, strict=True) if s):
            raise ValueError("the consumer is not element-wise")
        schedule.set_scope(block, 0, "local")
    else:
        last = schedule.cache_write(block, 0, "local")

    loops = schedule.get_loops(block)
    reduction = [loop for loop, is_spatial in zip(loops, access.spatial, strict=True) if not is_spatial]
    lanes = registers.lanes(access.element_bits)
    vector = access.vector_axis(max_stride=1)
    width = _vector_width(access.extents[vector], 4 * lanes, lanes) if vector is not None else 1
    if width < 2:
        vector = None
    per_row = -(-width // lanes)
    row = access.row_axis(excluding=vector)
    budget = max(1, min(_MAX_ROWS, (registers.count - 4) // per_row - 1))
    rows = _largest_divisor(access.extents[row], budget) if row is not None else 1

    outer, inner = [], []
    vector_loop = row_loop = None
    for axis, loop in enumerate(loops):
        if not access.spatial[axis]:
            continue
        if axis == vector:
            loop, vector_loop = schedule.split(loop, [None, width])
        elif axis == row and rows > 1:
            loop, row_loop = schedule.split(loop, [None, rows])
        outer.append(loop)
    inner = [loop for loop in (row_loop, vector_loop) if loop is not None]
    schedule.reorder(*outer, *reduction, *inner)
    fused = schedule.fuse(*outer)
    schedule.reverse_compute_at(last, fused)
    if access.work >= _MIN_PARALLEL_WORK:
        schedule.parallel(fused)
    if vector_loop is not None:
        schedule.vectorize(vector_loop)
    if row_loop is not None:
        schedule.unroll(row_loop)
    schedule.decompose_reduction(block, reduction[0])
    _vectorise_copy(schedule, last, width if vector_loop is not None else 1)


def _vectorise_copy(schedule: Schedule, block: Any, width: int) -> None:
    loops = schedule.get_loops(block)
    if width > 1 and len(loops) > 1 and int(schedule.get(loops[-1]).extent) == width:
        schedule.vectorize(loops[-1])


def _vector_width(extent: int, most: int, lanes: int) -> int:
    """The divisor of ``extent`` that wastes the fewest lanes; among equals the one nearest to two registers."""
    best, best_score = 1, 0.0
    for width in range(2, min(extent, most) + 1):
        if extent % width:
            continue
        registers = -(-width // lanes)
        score = width / (registers * lanes) - 0.02 * abs(registers - 2)
        if score > best_score:
            best, best_score = width, score
    return best


def _largest_divisor(extent: int, most: int) -> int:
    return max(divisor for divisor in range(1, max(1, min(extent, most)) + 1) if extent % divisor == 0)
