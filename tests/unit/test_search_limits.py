"""Points that a GPU cannot run: told by arithmetic, and by what was rejected before."""

from __future__ import annotations

import random
from typing import Any

from tuner_server.search.features import FeatureTable
from tuner_server.search.registers import RegisterLimits
from tuner_server.search.space import DesignSpace, Point
from tuner_server.search.threads import ThreadLimits
from tuner_server.search.validity import ValidityModel

# Two loops of 64, each in three levels: blocks, threads, serial.
GPU_TRACE: list[Any] = [
    [
        ["GetSBlock", [], ["matmul", "main"], ["b0"]],
        ["GetLoops", ["b0"], [], ["l1", "l2"]],
        ["SamplePerfectTile", ["l1"], [3, 64], ["v3", "v4", "v5"]],
        ["Split", ["l1", "v3", "v4", "v5"], [True, False], ["l6", "l7", "l8"]],
        ["SamplePerfectTile", ["l2"], [3, 64], ["v9", "v10", "v11"]],
        ["Split", ["l2", "v9", "v10", "v11"], [True, False], ["l12", "l13", "l14"]],
        ["Fuse", ["l6", "l12"], [1], ["l15"]],
        ["Bind", ["l15"], ["blockIdx.x"], []],
        ["Fuse", ["l7", "l13"], [1], ["l16"]],
        ["Bind", ["l16"], ["threadIdx.x"], []],
        ["Annotate", ["b0", 32], ["meta_schedule.thread_extent_low_inclusive"], []],
        ["Annotate", ["b0", 256], ["meta_schedule.thread_extent_high_inclusive"], []],
    ],
    [[2, [4, 4, 4]], [4, [4, 8, 2]]],
]


def point(rows: int, columns: int) -> Point:
    return (64 // rows, rows, 1), (64 // columns, columns, 1)


def test_threads_of_a_block_are_the_product_of_what_is_bound_to_them() -> None:
    space = DesignSpace(0, GPU_TRACE)
    limits = ThreadLimits(space, GPU_TRACE[0], max_threads=1024)
    assert limits.allow(point(4, 8))
    assert limits.allow(point(16, 16))
    assert not limits.allow(point(4, 4))  # 16 threads, fewer than a warp
    assert not limits.allow(point(32, 16))  # 512, more than the annotation allows


def test_what_tensor_cores_bind_are_warps() -> None:
    trace = [[*GPU_TRACE[0], ["Annotate", ["b0", 1], ["warp_execution"], []]], GPU_TRACE[1]]
    limits = ThreadLimits(DesignSpace(0, trace), trace[0], max_threads=1024, warp_size=32)
    assert limits.allow(point(1, 1))  # one warp
    assert limits.allow(point(4, 2))  # 256 threads
    assert not limits.allow(point(4, 4))  # 512, more than the annotation allows


def test_the_target_limits_threads_too_and_a_cpu_does_not() -> None:
    space = DesignSpace(0, GPU_TRACE)
    assert not ThreadLimits(space, GPU_TRACE[0], max_threads=64).allow(point(16, 8))
    assert ThreadLimits(space, GPU_TRACE[0], max_threads=0).allow(point(64, 64))


# One loop of 1024 in MetaSchedule's five levels: blocks, virtual threads, threads, and two that each thread unrolls.
TILED: list[Any] = [
    [
        ["GetLoops", ["b0"], [], ["l1"]],
        ["SamplePerfectTile", ["l1"], [5, 64], ["v2", "v3", "v4", "v5", "v6"]],
        ["Split", ["l1", "v2", "v3", "v4", "v5", "v6"], [True, False], ["l7", "l8", "l9", "l10", "l11"]],
        ["Fuse", ["l7"], [1], ["l12"]],
        ["Bind", ["l12"], ["blockIdx.x"], []],
        ["Fuse", ["l8"], [1], ["l13"]],
        ["Bind", ["l13"], ["vthread.x"], []],
        ["Fuse", ["l9"], [1], ["l14"]],
        ["Bind", ["l14"], ["threadIdx.x"], []],
    ],
    [[1, [1, 4, 64, 2, 2]]],
]


def test_accumulators_of_a_thread_must_fit_into_its_registers() -> None:
    limits = RegisterLimits(DesignSpace(0, TILED), TILED[0], value_bytes=4, per_block=65536)
    assert limits.allow(((1, 4, 32, 4, 8),))
    assert limits.allow(((1, 16, 8, 2, 4),))
    assert not limits.allow(((1, 16, 4, 4, 4),))  # 256 of 255, virtual threads and both unrolled loops counted
    assert limits.allow(((1024, 1, 1, 1, 1),))


def test_the_threads_of_a_block_share_its_registers() -> None:
    limits = RegisterLimits(DesignSpace(0, TILED), TILED[0], value_bytes=4, per_block=16384)
    assert limits.allow(((1, 2, 128, 8, 8),))
    assert not limits.allow(((1, 2, 256, 8, 8),))


def test_two_half_precision_values_share_a_register_and_a_double_takes_two() -> None:
    space = DesignSpace(0, TILED)
    assert RegisterLimits(space, TILED[0], 2, 65536).allow(((1, 16, 4, 4, 4),))
    assert not RegisterLimits(space, TILED[0], 8, 65536).allow(((1, 8, 8, 4, 4),))


def test_loops_whose_extent_cannot_be_followed_pass() -> None:
    unknown = [list(instruction) for instruction in GPU_TRACE[0]]
    unknown[8] = ["Fuse", ["l7", "l99"], [1], ["l16"]]
    space = DesignSpace(0, [unknown, GPU_TRACE[1]])
    assert ThreadLimits(space, unknown, max_threads=1024).allow(point(64, 64))


def test_the_validity_of_points_is_learned_from_rejections() -> None:
    space = DesignSpace(0, GPU_TRACE)

    def fits(candidate: Point) -> bool:  # what is inside the threads has to fit into registers
        return candidate[0][2] * candidate[1][2] <= 8  # type: ignore[index]

    rng = random.Random(0)
    base: Point = ((4, 4, 4), (4, 8, 2))
    model = ValidityModel(FeatureTable([space]))
    unseen = [(space, space.redraw(base, rng)) for _ in range(200)]
    assert set(model.probability(unseen)) == {1.0}
    for _ in range(60):
        drawn = space.redraw(base, rng)
        model.record((space, drawn), fits(drawn))
    likely = model.probability(unseen) >= 0.5
    right = sum(bool(guess) == fits(candidate) for guess, (_, candidate) in zip(likely, unseen, strict=True))
    assert right > 0.9 * len(unseen)
