"""Shared memory of a point by arithmetic, against sizes worked out by hand."""

from __future__ import annotations

from typing import Any

from tuner_server.search.shared_memory import Access, BlockAccesses, SharedMemoryLimits, Span
from tuner_server.search.space import DesignSpace, Point

# C[i, j] += A[i, k] * B[k, j]: blocks, virtual threads, threads, k in steps, and what a thread unrolls.
INSTRUCTIONS: list[Any] = [
    ["GetLoops", ["b0"], [], ["l1", "l2", "l3"]],
    ["SamplePerfectTile", ["l1"], [5, 64], ["v4", "v5", "v6", "v7", "v8"]],
    ["Split", ["l1", "v4", "v5", "v6", "v7", "v8"], [1, 0], ["i0", "i1", "i2", "i3", "i4"]],
    ["SamplePerfectTile", ["l2"], [5, 64], ["v9", "v10", "v11", "v12", "v13"]],
    ["Split", ["l2", "v9", "v10", "v11", "v12", "v13"], [1, 0], ["j0", "j1", "j2", "j3", "j4"]],
    ["SamplePerfectTile", ["l3"], [3, 64], ["v14", "v15", "v16"]],
    ["Split", ["l3", "v14", "v15", "v16"], [1, 0], ["k0", "k1", "k2"]],
    ["Reorder", ["i0", "j0", "i1", "j1", "i2", "j2", "k0", "k1", "i3", "j3", "k2", "i4", "j4"], [], []],
    ["Fuse", ["i0", "j0"], [1], ["f0"]],
    ["Bind", ["f0"], ["blockIdx.x"], []],
    ["Fuse", ["i1", "j1"], [1], ["f1"]],
    ["Bind", ["f1"], ["vthread.x"], []],
    ["Fuse", ["i2", "j2"], [1], ["f2"]],
    ["Bind", ["f2"], ["threadIdx.x"], []],
    ["CacheRead", ["b0", ["b0"]], [0, "shared"], ["b1"]],
    ["ComputeAt", ["b1", "k0"], [1, -1], []],
    ["CacheRead", ["b0", ["b0"]], [1, "shared"], ["b2"]],
    ["ComputeAt", ["b2", "k0"], [1, -1], []],
]
SIZE = 256
A = Access(4, (Span(1, (1, 0, 0), SIZE), Span(1, (0, 0, 1), SIZE)))
B = Access(4, (Span(1, (0, 0, 1), SIZE), Span(1, (0, 1, 0), SIZE)))
C = Access(4, (Span(1, (1, 0, 0), SIZE), Span(1, (0, 1, 0), SIZE)))
POINT: Point = ((8, 2, 4, 2, 2), (4, 1, 16, 4, 1), (32, 4, 2))  # tiles: i 32, j 64, k 8


def limits(
    *more: Any, reads: tuple[Access, ...] = (A, B), limit_bytes: int = 49152, scope: str = "shared"
) -> SharedMemoryLimits:
    instructions = [
        [kind, inputs, [attrs[0], scope] if kind == "CacheRead" else attrs, outputs]
        for kind, inputs, attrs, outputs in INSTRUCTIONS
    ] + list(more)
    space = DesignSpace(0, [instructions, []])
    return SharedMemoryLimits(space, instructions, {"b0": BlockAccesses(reads, C)}, limit_bytes)


def test_tiles_of_a_matrix_product() -> None:
    tile_bytes = 4 * (32 * 8 + 8 * 64)
    assert limits().size(POINT) == tile_bytes
    assert limits(limit_bytes=tile_bytes).allow(POINT)
    assert not limits(limit_bytes=tile_bytes - 1).allow(POINT)


def test_neighbouring_reads_of_a_convolution_share_elements() -> None:
    strided = Access(4, (Span(1, (2, 0, 1), SIZE), Span(1, (0, 1, 0), SIZE)))  # 2 * i + k
    assert limits(reads=(strided, B)).size(POINT) == 4 * ((2 * 31 + 7 + 1) * 64 + 8 * 64)


def test_no_tile_is_larger_than_its_buffer() -> None:
    narrow = Access(4, (Span(1, (2, 0, 1), 40), Span(1, (0, 1, 0), SIZE)))
    assert limits(reads=(narrow, B)).size(POINT) == 4 * (40 * 64 + 8 * 64)


def test_padded_rows_keep_threads_off_each_others_banks() -> None:
    align = [
        "StorageAlign",
        ["b2"],
        [0, -2, 32, 8],
        [],
    ]  # 64 elements: the next stride of 32 n + 8
    assert limits(align).size(POINT) == 4 * (32 * 8 + 8 * 72)


def test_a_pipeline_keeps_a_version_for_each_stage_and_needs_two_steps() -> None:
    pipeline = ["Annotate", ["k0", [0, 0, 2]], ["software_pipeline_stage"], []]
    assert limits(pipeline).size(POINT) == 3 * limits().size(POINT)
    one_step: Point = ((8, 2, 4, 2, 2), (4, 1, 16, 4, 1), (1, 4, 64))
    assert limits(limit_bytes=1 << 20).allow(one_step)
    assert not limits(pipeline, limit_bytes=1 << 20).allow(one_step)


def test_tensor_cores_write_back_where_their_inputs_were() -> None:
    write_back = ["CacheWrite", ["b0", []], [0, "shared.dyn"], ["b3"]]
    inputs = limits(scope="shared.dyn").size(POINT)
    assert limits(write_back, scope="shared.dyn").size(POINT) == inputs  # 4 * 16 threads, 4 of each along j: less
    many: Point = ((1, 1, 32, 4, 2), (1, 1, 16, 4, 4), (256, 1, 1))
    assert limits(write_back, scope="shared.dyn").size(many) == 4 * 32 * 16 * 4 * 4


def test_what_cannot_be_followed_counts_as_nothing() -> None:
    unknown = Access(4, (Span(1, None, SIZE), Span(1, (0, 0, 1), SIZE)))
    assert limits(reads=(unknown, B)).size(POINT) == 4 * 8 * 64
    space = DesignSpace(0, [INSTRUCTIONS, []])
    assert SharedMemoryLimits(space, INSTRUCTIONS, {}, 1).allow(POINT)
