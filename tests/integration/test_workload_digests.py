"""A workload's digest is the operator's identity: the same in every process, model and choice of names."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.integration.compiler_operators import conv, heaviest, prepared
from tuner_core.compiler.tvm_setup import load_tvm
from tuner_core.compiler.workload import digest_of, module_from_body, normalise, workload_from_module
from tuner_core.errors import InvalidRecordError
from tuner_core.model import sha256_hex


def _scaled_sum(first: str, second: str, *, factor: float = 2.0, block: str = "C") -> Any:
    load_tvm()
    from tvm import te

    a = te.placeholder((16, 8), name=first)
    k = te.reduce_axis((0, 8), name=f"{second}_axis")
    c = te.compute((16,), lambda i: te.sum(a[i, k] * factor, axis=k), name=block)
    return te.create_prim_func([a, c])


def test_names_of_variables_do_not_matter_but_values_and_block_names_do() -> None:
    reference = digest_of(_scaled_sum("A", "k"))
    assert digest_of(_scaled_sum("something", "else")) == reference
    assert digest_of(_scaled_sum("A", "k", factor=3.0)) != reference
    assert digest_of(_scaled_sum("A", "k", block="D")) != reference, "traces refer to blocks by name"


def test_same_operator_in_two_models_is_one_workload() -> None:
    import tvm_ffi

    shapes = ((1, 8, 14, 14), (8, 8, 3, 3), (8, 8, 3, 3))

    def two(op: Any, x: Any, w: Any, v: Any) -> Any:
        pooled = op.nn.max_pool2d(conv(op, x, w, padding=(1, 1)), pool_size=(3, 3), padding=(1, 1))
        return conv(op, pooled, v, padding=(1, 1))

    once = prepared(lambda op, x, w, v: conv(op, x, w, padding=(1, 1)), *shapes)
    twice = prepared(two, *shapes)
    (first,) = [task for task in once.tasks if task.tunable]
    (second,) = [task for task in twice.tasks if task.tunable]
    assert (first.weight, second.weight) == (1, 2)
    assert first.workload == second.workload
    assert tvm_ffi.structural_equal(module_from_body(first.workload.body), module_from_body(second.workload.body))


def test_digest_is_the_same_in_another_process_and_after_a_round_trip() -> None:
    import tvm_ffi

    workload = workload_from_module(_scaled_sum("A", "k"))
    assert workload.digest == sha256_hex(workload.body)
    again = workload_from_module(module_from_body(workload.body))
    assert again == workload
    assert tvm_ffi.structural_equal(module_from_body(workload.body), normalise(_scaled_sum("A", "k")))
    program = (
        "import sys, json; from tuner_core.compiler.workload import *; body = sys.stdin.read();"
        "w = workload_from_module(module_from_body(body)); print(json.dumps([w.digest, w.structural_hash]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input=workload.body, capture_output=True, text=True, timeout=120, check=True
    )
    assert json.loads(done.stdout) == [workload.digest, workload.structural_hash]


def test_structural_hash_is_the_one_that_tvms_database_writes() -> None:
    from tvm.s_tir import meta_schedule as ms

    workload = workload_from_module(_scaled_sum("A", "k"))
    assert workload.structural_hash == str(ms.database.Workload(module_from_body(workload.body)).as_json()[0])


def test_arguments_are_listed_with_outputs_last() -> None:
    task = heaviest(lambda op, a, b: op.matmul(a, b), (4, 8), (8, 16))
    assert task.workload.args_info == (
        ("TENSOR", "float32", (4, 8)),
        ("TENSOR", "float32", (8, 16)),
        ("TENSOR", "float32", (4, 16)),
    )


def test_what_is_no_workload_is_refused() -> None:
    import tvm

    for body in ("", "{}", "[1]", '{"nodes": [], "root_index": 3}', tvm.ir.save_json(tvm.ir.IRModule({}))):
        with pytest.raises(InvalidRecordError):
            module_from_body(body)
    function = _scaled_sum("A", "k")
    with pytest.raises(InvalidRecordError, match="2 functions"):
        workload_from_module(tvm.IRModule({"main": function, "other": function}))


DESCRIPTIONS = [
    (
        lambda op, x, w: conv(op, x, w, padding=(1, 1)),
        [(1, 64, 56, 56), (64, 64, 3, 3)],
        ("conv2d", "conv2d 1x64x56x56 -> 64, 3x3, fp32, NCHW + relu"),
    ),
    (
        lambda op, x, w: op.nn.conv2d(x, w, strides=(2, 2), data_layout="NHWC", kernel_layout="HWIO"),
        [(1, 57, 57, 64), (3, 3, 64, 128)],
        ("conv2d", "conv2d 1x57x57x64 -> 128, 3x3, stride 2, fp32, NHWC"),
    ),
    (
        lambda op, x, w: op.nn.conv2d(x, w, dilation=(2, 2)),
        [(1, 16, 32, 32), (8, 16, 3, 3)],
        ("conv2d", "conv2d 1x16x32x32 -> 8, 3x3, dilation 2, fp32, NCHW"),
    ),
    (
        lambda op, x, w: op.nn.conv2d(x, w, groups=32, padding=(1, 1), strides=(2, 2)),
        [(1, 32, 28, 28), (32, 1, 3, 3)],
        ("depthwise_conv2d", "depthwise_conv2d 1x32x28x28 -> 32, 3x3, stride 2, fp32, NCHW"),
    ),
    (
        lambda op, x, w: op.nn.conv2d(x, w, groups=4),
        [(1, 32, 28, 28), (64, 8, 1, 1)],
        ("group_conv2d", "group_conv2d 1x32x28x28 -> 64, 1x1, groups 4, fp32, NCHW"),
    ),
    (
        lambda op, x, w: op.nn.conv2d_transpose(x, w, strides=(2, 2)),
        [(1, 8, 14, 14), (8, 16, 4, 4)],
        ("conv2d_transpose", "conv2d_transpose 1x8x14x14 -> 16, 4x4, fp32, NCHW"),
    ),
    (lambda op, x, w: op.nn.conv1d(x, w), [(1, 16, 100), (8, 16, 5)], ("conv1d", "conv1d 1x16x100 -> 8, 5, fp32, NCW")),
    (lambda op, a, b: op.matmul(a, b), [(4, 512), (512, 100)], ("dense", "dense 4x512 -> 100, fp32")),
    (
        lambda op, a, b, c: op.add(op.matmul(a, b), c),
        [(1, 512), (512, 1000), (1000,)],
        ("dense", "dense 1x512 -> 1000, fp32 + add"),
    ),
    (
        lambda op, a, b: op.matmul(a, b),
        [(12, 128, 64), (12, 64, 128)],
        ("batch_matmul", "batch_matmul 12x128x64 @ 12x64x128, fp32"),
    ),
    (
        lambda op, x: op.nn.max_pool2d(x, pool_size=(3, 3), strides=(2, 2)),
        [(1, 64, 111, 111)],
        ("max_pool2d", "max_pool2d 1x64x111x111 -> 55x55, 3x3, stride 2, fp32, NCHW"),
    ),
    (
        lambda op, x: op.nn.avg_pool2d(x, pool_size=(2, 2), strides=(2, 2)),
        [(1, 64, 28, 28)],
        ("avg_pool2d", None),
    ),
    (lambda op, x: op.mean(x, [2, 3]), [(1, 64, 7, 7)], ("mean", "mean 1x64x7x7 -> 1x64, fp32")),
    (lambda op, x: op.nn.softmax(x), [(8, 100)], ("softmax", "softmax 8x100, fp32")),
    (lambda op, x: op.nn.log_softmax(x), [(8, 100)], ("log_softmax", "log_softmax 8x100, fp32")),
    (
        lambda op, a, b: op.nn.relu(op.add(a, b)),
        [(1, 64, 56, 56), (1, 64, 56, 56)],
        ("add", "add 1x64x56x56 1x64x56x56 -> 1x64x56x56, fp32 + relu"),
    ),
    (
        lambda op, a, b: op.concat([a, b], axis=1),
        [(1, 3, 8, 8), (1, 5, 8, 8)],
        ("concatenate", "concatenate 1x3x8x8 1x5x8x8 -> 1x8x8x8, fp32"),
    ),
    (
        lambda op, x: op.permute_dims(x, [0, 2, 1]),
        [(1, 3, 8)],
        ("transpose", "transpose 1x3x8 -> 1x8x3, fp32"),
    ),
]


@pytest.mark.parametrize(("compute", "shapes", "expected"), DESCRIPTIONS, ids=[case[2][0] for case in DESCRIPTIONS])
def test_description(compute: Any, shapes: Any, expected: tuple[str, str | None]) -> None:
    workload = heaviest(compute, *shapes).workload
    assert workload.op == expected[0]
    if expected[1] is not None:
        assert workload.description == expected[1]


def test_half_precision_is_called_fp16() -> None:
    task = heaviest(lambda op, a, b: op.matmul(a, b), (32, 64), (64, 32), dtype="float16")
    assert task.workload.description == "dense 32x64 -> 32, fp16"


@pytest.mark.parametrize(
    ("compute", "shapes", "worth"),
    [
        (lambda op, x, w: op.nn.conv2d(x, w), [(1, 8, 16, 16), (8, 8, 3, 3)], True),
        (lambda op, a, b: op.matmul(a, b), [(64, 64), (64, 64)], True),
        (lambda op, a, b: op.matmul(a, b), [(1, 8), (8, 10)], False),
        (lambda op, x: op.nn.max_pool2d(x, pool_size=(3, 3)), [(1, 64, 56, 56)], False),
        (lambda op, x: op.nn.softmax(x), [(128, 1000)], False),
        (lambda op, x: op.permute_dims(x, [1, 0]), [(512, 512)], False),
    ],
    ids=["conv2d", "dense", "tiny dense", "pool", "softmax", "transpose"],
)
def test_trials_go_to_contractions_of_some_size(compute: Any, shapes: Any, worth: bool) -> None:
    assert [task.tunable for task in prepared(compute, *shapes).tasks] == [worth]


def test_a_graph_is_loaded_as_tvm_loads_it_also_one_of_an_older_version() -> None:
    import tvm
    import tvm_ffi

    from tuner_core.compiler.graph import load_graph

    body = workload_from_module(_scaled_sum("A", "k")).body
    expected = tvm.ir.load_json(body)
    old = json.loads(body)
    old["metadata"]["tvm_version"] = "0.20.0"
    for node in old["nodes"]:
        if node["type"] == "ir.Var":
            node["type"] = "tirx.Var"
            node["data"]["name_hint"] = node["data"].pop("name")
    twice = body.replace('"root_index":', '"root_index":0,"root_index":')  # a check in Python sees the second one
    assert twice != body
    for text in (body, json.dumps(old), twice):
        assert tvm_ffi.structural_equal(load_graph(text), expected)
