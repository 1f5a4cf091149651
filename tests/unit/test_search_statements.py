"""How many statements a kernel has at least, told from its decisions."""

from __future__ import annotations

from typing import Any

import pytest

from tuner_server.search.shared_memory import STAGES, Access, BlockAccesses, SharedMemoryLimits, Span
from tuner_server.search.space import DesignSpace, Point
from tuner_server.search.statements import StatementLimits

# One loop in blocks, virtual threads, threads and two serial levels, a sum in three; one input is copied to shared
# memory in each step of the outermost sum, one to four elements at a time.
TRACE: list[Any] = [
    [
        ["GetSBlock", [], ["sums", "main"], ["b0"]],
        ["GetLoops", ["b0"], [], ["l1", "l2"]],
        ["SamplePerfectTile", ["l1"], [5, 64], ["v0", "v1", "v2", "v3", "v4"]],
        ["Split", ["l1", "v0", "v1", "v2", "v3", "v4"], [True, False], ["s0", "s1", "s2", "s3", "s4"]],
        ["SamplePerfectTile", ["l2"], [3, 64], ["v5", "v6", "v7"]],
        ["Split", ["l2", "v5", "v6", "v7"], [True, False], ["r0", "r1", "r2"]],
        ["Reorder", ["s0", "s1", "s2", "r0", "r1", "s3", "r2", "s4"], [], []],
        ["Bind", ["s0"], ["blockIdx.x"], []],
        ["Bind", ["s1"], ["vthread.x"], []],
        ["Bind", ["s2"], ["threadIdx.x"], []],
        ["CacheRead", ["b0"], [0, "shared"], ["b1"]],
        ["ComputeAt", ["b1", "r0"], [1, -1], []],
        ["SampleCategorical", [], [[1, 2, 4], [0.25, 0.25, 0.5]], ["v8"]],
        ["Annotate", ["b1", "v8"], ["meta_schedule.cooperative_fetch"], []],
        ["SampleCategorical", [], [[0, 64, 1024], [0.25, 0.25, 0.5]], ["v9"]],
        ["Annotate", ["b0", "v9"], ["meta_schedule.unroll_explicit"], []],
    ],
    [[2, [2, 2, 32, 4, 2]], [4, [16, 4, 8]], [12, 0], [14, 0]],
]
READ = Access(4, (Span(1, (1, 0), 1 << 20), Span(1, (0, 1), 1 << 20)))


def limits(trace: list[Any], limit: int = 3000) -> StatementLimits:
    space = DesignSpace(0, trace)
    accesses = {"b0": BlockAccesses((READ,), Access(4, (Span(1, (1, 0), 1 << 20),)))}
    shared = SharedMemoryLimits(space, trace[0], accesses, limit_bytes=1 << 20)
    return StatementLimits(space, trace[0], shared, limit=limit)


def point(virtual: int = 1, serial: int = 1, outer: int = 8, inner: int = 8, vector: int = 0, unroll: int = 0) -> Point:
    return (2, virtual, 32, serial, 1), (outer, 1, inner), vector, unroll


@pytest.mark.parametrize(
    ("decided", "statements"),
    [
        # first values + their writing back + what is added + what each of 32 threads copies of the tile
        (point(), 1 + 1 + 1 + 1),
        (point(virtual=8), 8 + 8 + 8 + 1),  # virtual threads are statements whatever may be unrolled
        (point(virtual=32), 1 + 1 + 1 + 1),  # unless they are 16 or more: then their loop stays one
        (point(serial=4, unroll=1), 4 + 4 + 32 + 4 * 32 * 8 // 32),
        (point(serial=4, unroll=1, vector=2), 4 + 4 + 32 + 4 * 32 * 8 // 32 // 4),
        (point(serial=16, unroll=1), 16 + 16 + 8 + 1),  # 128 sums and copies exceed the limit, 8 sums do not
        (point(serial=16, unroll=2), 16 + 16 + 128 + 128),
    ],
)
def test_statements_are_the_accesses_of_the_loops_that_tvm_unrolls(decided: Point, statements: int) -> None:
    assert limits(TRACE).at_least(decided) == statements


def test_a_pipeline_repeats_what_is_inside_it_for_each_stage() -> None:
    trace = [[*TRACE[0], ["Annotate", ["r0", [0, 2]], [STAGES], []]], TRACE[1]]
    assert limits(trace).at_least(point(serial=16, unroll=2)) == 16 + 16 + 3 * (128 + 128)
    assert limits(trace).at_least(point(serial=16, unroll=2, outer=2)) == 16 + 16 + 2 * (128 + 128)


def test_a_point_of_more_statements_than_a_build_may_have_is_refused() -> None:
    decided = point(serial=16, unroll=2)
    assert limits(TRACE, limit=288).allow(decided)
    assert not limits(TRACE, limit=287).allow(decided)


@pytest.mark.parametrize("unroll", [0, 1, 2])
def test_no_large_kernel_passes_for_its_limit_of_unrolling(unroll: int) -> None:
    for limit in (16, 70, 300, 3000):
        checked = limits(TRACE, limit=limit)
        for virtual in (1, 8, 16, 32):
            for serial in (1, 4, 64):
                decided = point(virtual=virtual, serial=serial, unroll=unroll)
                assert checked.allow(decided) == (checked.at_least(decided) <= limit)
