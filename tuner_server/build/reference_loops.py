"""Loops of a reference in an order that a processor likes: the same operations on each element, in the same order.

As operators are legalised, the innermost loop of a sum runs over its terms: each waits for the one before, and where it
walks along a column, each fetches another cache line. Here elements that lie side by side are summed up side by side.
Nothing is taken from the schedules that a reference checks: loops are split, reordered, unrolled and vectorised, TVM
refuses what would change a result, and no element's terms change their order, so that results are equal bit by bit.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm.s_tir import Schedule

from tuner_core.compiler.access import BlockAccess, analyse_block

_WORTH_IT = 1 << 20  # iterations of a block: a millisecond
_LANES = 32  # elements of which the rows below fit into vector registers of 256 bits as well
_ROWS = 4
_FEW = 4
_STREAMS = 16  # elements at once that do not lie side by side in what is read


def in_fast_order(mod: tvm.IRModule) -> tvm.IRModule:
    """The module with its long reductions reordered; those that it cannot be done for stay as they are.

    Args:
        mod: A workload's module, unscheduled.
    """
    schedule = Schedule(mod, error_render_level="none")
    try:
        blocks = schedule.get_child_blocks(schedule.get_sblock("root", func_name="main"))
    except Exception:  # not in the form of a workload: TVM has no common base of its errors
        return mod
    for block in blocks:
        attempt = schedule.copy()
        try:
            access = analyse_block(attempt, block)
            if access.is_reduction and access.static and access.work >= _WORTH_IT:
                _reorder(attempt, block, access)
                schedule = attempt
        except Exception:
            continue
    return schedule.mod


def _reorder(schedule: Schedule, block: Any, access: BlockAccess) -> None:
    axis = _axis(access)
    if axis is None:
        return
    loops = schedule.get_loops(block)
    spatial = [at for at, is_spatial in enumerate(access.spatial) if is_spatial and at != axis]
    order = {at: loops[at] for at in spatial}
    reductions = [loop for at, loop in enumerate(loops) if not access.spatial[at]]
    side_by_side = all(read.strides[axis] <= 1 for read in access.reads)
    lanes = _divisor(access.extents[axis], _LANES if side_by_side else _STREAMS)
    if lanes < min(_FEW, access.extents[axis]):  # of a prime number
        if not side_by_side:
            return
        schedule.reorder(*order.values(), *reductions, loops[axis])  # LLVM vectorises it
        schedule.decompose_reduction(block, reductions[0])
        return
    outer, inner = schedule.split(loops[axis], [None, lanes])
    rows: list[Any] = []
    of_rows = next(iter(access.row_axes(axis, with_vector=True)), None) if side_by_side else None
    if of_rows is not None:
        order[of_rows], row = schedule.split(loops[of_rows], [None, _divisor(access.extents[of_rows], _ROWS)])
        rows = [row]
    schedule.reorder(outer, *order.values(), *reductions, *rows, inner)
    for loop in rows:
        schedule.unroll(loop)
    if side_by_side:
        schedule.vectorize(inner)
    else:
        schedule.unroll(inner)
    schedule.decompose_reduction(block, reductions[0])


def _axis(access: BlockAccess) -> int | None:
    """The loop along which elements of the result lie side by side."""
    for at, extent in enumerate(access.extents):
        if access.spatial[at] and extent > 1 and access.write_strides[at] == 1:
            return at
    return None


def _divisor(extent: int, most: int) -> int:
    return max(width for width in range(1, min(extent, most) + 1) if extent % width == 0)
