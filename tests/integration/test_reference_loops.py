"""References in an order that a processor likes are the naive loops' results, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.compiler_operators import conv, heaviest
from tuner_core.compiler.workload import module_from_body
from tuner_core.model import Workload

Compute = Callable[..., Any]


def nhwc(op: Any, x: Any, w: Any) -> Any:
    return conv(op, x, w, padding=(1, 1), data_layout="NHWC", kernel_layout="OHWI")


OPERATORS: dict[str, tuple[Compute, list[tuple[int, ...]], str]] = {
    "conv2d": (lambda op, x, w: conv(op, x, w, padding=(1, 1)), [(1, 16, 14, 14), (32, 16, 3, 3)], "float32"),
    "conv2d, stride 2": (lambda op, x, w: conv(op, x, w, strides=(2, 2)), [(2, 16, 15, 15), (24, 16, 3, 3)], "float32"),
    "conv2d, NHWC, fp16": (nhwc, [(1, 14, 14, 16), (32, 3, 3, 16)], "float16"),
    "depthwise": (lambda op, x, w: conv(op, x, w, groups=16), [(1, 16, 18, 18), (16, 1, 3, 3)], "float32"),
    "matmul": (lambda op, a, b: op.matmul(a, b), [(64, 96), (96, 48)], "float32"),
    "matmul, fp16": (lambda op, a, b: op.matmul(a, b), [(64, 96), (96, 48)], "float16"),
    "matmul of prime extents": (lambda op, a, b: op.matmul(a, b), [(61, 97), (97, 53)], "float32"),
    "matmul, int8": (lambda op, a, b: op.matmul(a, b, out_dtype="int32"), [(32, 96), (96, 48)], "int8"),
    "dense": (lambda op, x, w: op.nn.relu(op.linear(x, w)), [(4, 96), (48, 96)], "float32"),
    "batch_matmul": (lambda op, a, b: op.matmul(a, b), [(3, 16, 32), (3, 32, 24)], "float32"),
    "softmax": (lambda op, x: op.nn.softmax(x), [(48, 96)], "float32"),
    "max_pool2d": (lambda op, x: op.nn.max_pool2d(x, (3, 3), (2, 2), (1, 1)), [(1, 16, 16, 16)], "float32"),
    "avg_pool2d": (lambda op, x: op.nn.avg_pool2d(x, (2, 2), (2, 2)), [(1, 16, 16, 16)], "float32"),
    "sum over rows": (lambda op, x: op.sum(x, axis=0), [(96, 48)], "float32"),
}


def reference(workload: Workload, out: Path) -> dict[str, np.ndarray[Any, Any]]:
    from tuner_server.build.reference import write_reference

    write_reference(module_from_body(workload.body), workload.args_info, 3, out)
    with np.load(out) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("name", OPERATORS)
def test_outputs_are_those_of_the_naive_loops_bit_by_bit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, shapes, dtype = OPERATORS[name]
    workload = heaviest(compute, *shapes, dtype=dtype).workload
    naive = reference(workload, tmp_path / "naive.npz")
    assert np.unique(naive["out0"]).size > 1

    import tvm_ffi

    from tuner_server.build import reference_loops

    monkeypatch.setattr(reference_loops, "_WORTH_IT", 0)
    module = module_from_body(workload.body)
    assert not tvm_ffi.structural_equal(reference_loops.in_fast_order(module), module), "it is another order"
    fast = reference(workload, tmp_path / "fast.npz")
    assert set(fast) == set(naive)
    for part, array in naive.items():
        assert array.tobytes() == fast[part].tobytes(), part


def test_columns_are_read_side_by_side_and_kept_in_registers() -> None:
    from tuner_server.build.reference_loops import in_fast_order

    workload = heaviest(lambda op, a, b: op.matmul(a, b), (128, 128), (128, 128)).workload
    text = in_fast_order(module_from_body(workload.body)).script()
    assert "T.vectorized(T.int64(32))" in text
    assert "T.unroll(T.int64(4))" in text


@pytest.mark.parametrize(
    ("compute", "shape"),
    [
        (lambda op, x: op.exp(x), (1024, 2048)),  # no sum
        (lambda op, x: op.sum(x), (1024, 2048)),  # of one element
        (lambda op, x: op.argmax(x, axis=1), (1024, 2048)),  # writes two buffers
        (lambda op, x: op.sum(x, axis=0), (8, 16)),  # too short to matter
        (lambda op, x: op.cumsum(x, axis=0), (1024, 2048)),  # not a block with loops of its own
    ],
)
def test_what_the_order_does_not_help_stays_as_it_is(compute: Compute, shape: tuple[int, ...]) -> None:
    import tvm_ffi

    from tuner_server.build.reference_loops import in_fast_order

    module = module_from_body(heaviest(compute, shape).workload.body)
    assert tvm_ffi.structural_equal(in_fast_order(module), module)


def test_an_order_that_does_not_compile_is_replaced_by_the_naive_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuner_server.build import reference as references

    workload = heaviest(lambda op, a, b: op.matmul(a, b), (16, 32), (32, 16)).workload
    naive = reference(workload, tmp_path / "naive.npz")

    def broken(mod: Any) -> Any:
        raise ValueError("no such order")

    monkeypatch.setattr(references, "in_fast_order", broken)
    np.testing.assert_array_equal(reference(workload, tmp_path / "again.npz")["out0"], naive["out0"])
