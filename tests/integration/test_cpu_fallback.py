"""The zero-trial schedules: legal for everything, parallel and vectorised where it matters, right, and replayable."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.integration import compiler_operators as operators
from tests.integration.compiler_operators import AVX512, CUDA, LLVM, conv, heaviest
from tuner_client.model.prepare import ExtractedTask, parse_target
from tuner_core.compiler.fallback import fallback_schedule
from tuner_core.compiler.trace import apply_trace, is_empty, trace_to_json
from tuner_core.compiler.workload import module_from_body

OPERATORS: dict[str, Any] = {
    "conv2d, wide rows": lambda: heaviest(conv_padded, (1, 8, 16, 16), (32, 8, 3, 3)),
    "conv2d, odd rows": lambda: heaviest(conv_padded, (1, 8, 27, 27), (32, 8, 3, 3)),
    "conv2d, stride 2": lambda: heaviest(conv_strided, (1, 3, 33, 33), (16, 3, 3, 3)),
    "conv2d, NHWC": lambda: heaviest(conv_nhwc, (1, 14, 14, 16), (32, 3, 3, 16)),
    "depthwise": lambda: heaviest(conv_depthwise, (1, 32, 14, 14), (32, 1, 3, 3)),
    "group conv2d": lambda: heaviest(conv_groups, (1, 32, 14, 14), (64, 8, 3, 3)),
    "conv2d alone": lambda: heaviest(lambda op, x, w: op.nn.conv2d(x, w), (1, 64, 16, 16), (16, 64, 1, 1)),
    "dense": lambda: heaviest(lambda op, a, b: op.matmul(a, b), (1, 256), (256, 100)),
    "dense, transposed": lambda: heaviest(lambda op, a, b: op.linear(a, b), (4, 64), (96, 64)),
    "batch_matmul": lambda: heaviest(lambda op, a, b: op.matmul(a, b), (3, 32, 48), (3, 48, 40)),
    "max_pool2d": lambda: heaviest(pooled, (1, 16, 33, 33)),
    "mean": lambda: heaviest(lambda op, x: op.mean(x, [2, 3]), (1, 64, 13, 13)),
    "softmax": lambda: heaviest(lambda op, x: op.nn.softmax(x), (8, 100)),
    "layer_norm": lambda: heaviest(lambda op, x, a, b: op.nn.layer_norm(x, a, b, axes=[-1]), (4, 96), (96,), (96,)),
    "add": lambda: heaviest(lambda op, a, b: op.add(a, b), (64, 56, 56), (64, 56, 56)),
    "concatenate": lambda: heaviest(lambda op, a, b: op.concat([a, b], axis=1), (1, 40, 57, 57), (1, 24, 57, 57)),
    "transpose": lambda: heaviest(lambda op, x: op.permute_dims(x, [0, 2, 1]), (4, 200, 200)),
    "argmax": lambda: heaviest(lambda op, x: op.argmax(x, axis=1), (16, 40)),
    "cumsum": lambda: heaviest(lambda op, x: op.cumsum(x, axis=1), (16, 40)),
    "topk": lambda: heaviest(lambda op, x: op.topk(x, k=3, ret_type="values"), (4, 50)),
    "scalar": lambda: heaviest(lambda op, x: op.exp(x), ()),
    "one element": lambda: heaviest(lambda op, a, b: op.matmul(a, b), (1, 1), (1, 1)),
}
REDUCTIONS = [
    name for name in OPERATORS if name.startswith(("conv", "depth", "group", "dense", "batch", "max", "mean"))
]


def conv_padded(op: Any, x: Any, w: Any) -> Any:
    return conv(op, x, w, padding=(1, 1))


def conv_strided(op: Any, x: Any, w: Any) -> Any:
    return conv(op, x, w, strides=(2, 2))


def conv_nhwc(op: Any, x: Any, w: Any) -> Any:
    return conv(op, x, w, padding=(1, 1), data_layout="NHWC", kernel_layout="OHWI")


def conv_depthwise(op: Any, x: Any, w: Any) -> Any:
    return conv(op, x, w, padding=(1, 1), groups=32)


def conv_groups(op: Any, x: Any, w: Any) -> Any:
    return conv(op, x, w, padding=(1, 1), groups=4)


def pooled(op: Any, x: Any) -> Any:
    return op.nn.max_pool2d(x, pool_size=(3, 3), strides=(2, 2))


def loop_kinds(module: Any) -> set[int]:
    import tvm_ffi
    from tvm import tirx

    kinds: set[int] = set()
    tvm_ffi.structural_walk(module["main"].body, (tirx.For, lambda loop: kinds.add(int(loop.kind))))
    return kinds


@pytest.fixture(scope="module", params=list(OPERATORS))
def scheduled(request: pytest.FixtureRequest) -> tuple[str, ExtractedTask, Any, Any]:
    task = OPERATORS[request.param]()
    module = module_from_body(task.workload.body)
    return request.param, task, module, fallback_schedule(module, parse_target(LLVM))


def test_computes_what_the_unscheduled_loops_compute(scheduled: tuple[str, ExtractedTask, Any, Any]) -> None:
    _, task, module, schedule = scheduled
    target = parse_target(LLVM)
    inputs = operators.random_inputs(task, len(task.workload.args_info) - 1)
    expected = operators.run(module, target, inputs)
    for given, wanted in zip(operators.run(schedule.mod, target, inputs), expected, strict=True):
        np.testing.assert_allclose(given, wanted, rtol=1e-4, atol=1e-5)


def test_trace_replays_to_the_same_schedule(scheduled: tuple[str, ExtractedTask, Any, Any]) -> None:
    import tvm_ffi

    name, task, _, schedule = scheduled
    trace = trace_to_json(schedule)
    assert json.loads(trace)
    replayed = apply_trace(module_from_body(task.workload.body), trace)
    assert tvm_ffi.structural_equal(replayed.mod, schedule.mod), name


@pytest.mark.parametrize("target", [LLVM, AVX512])
@pytest.mark.parametrize("name", [name for name in REDUCTIONS if "conv2d" in name or name == "dense"])
def test_contractions_run_in_parallel_and_in_registers(name: str, target: str) -> None:
    from tvm.tirx import ForKind

    task = OPERATORS[name]()
    schedule = fallback_schedule(module_from_body(task.workload.body), parse_target(target))
    kinds = loop_kinds(schedule.mod)
    if name != "dense":  # 25,600 multiply-adds do not pay for a second thread
        assert int(ForKind.PARALLEL) in kinds
    assert int(ForKind.VECTORIZED) in kinds
    assert '"local"' in schedule.mod.script()


@pytest.mark.parametrize("name", ["mean", "max_pool2d", "depthwise"])
def test_other_reductions_run_in_parallel(name: str) -> None:
    from tvm.tirx import ForKind

    schedule = fallback_schedule(module_from_body(OPERATORS[name]().workload.body), parse_target(LLVM))
    work = {"mean": 64 * 169, "max_pool2d": 16 * 16 * 16 * 9, "depthwise": 32 * 14 * 14 * 9}[name]
    assert (int(ForKind.PARALLEL) in loop_kinds(schedule.mod)) == (work >= 32768)


def test_big_maps_run_in_parallel_and_vectorised_but_small_ones_on_one_thread() -> None:
    from tvm.tirx import ForKind

    big = fallback_schedule(module_from_body(OPERATORS["add"]().workload.body), parse_target(LLVM))
    assert {int(ForKind.PARALLEL), int(ForKind.VECTORIZED)} <= loop_kinds(big.mod)
    task = heaviest(lambda op, a, b: op.add(a, b), (64, 64), (64, 64))
    small = fallback_schedule(module_from_body(task.workload.body), parse_target(LLVM))
    assert loop_kinds(small.mod) >= {int(ForKind.VECTORIZED)}
    assert int(ForKind.PARALLEL) not in loop_kinds(small.mod)


def test_vector_width_follows_the_target() -> None:
    task = heaviest(lambda op, a, b: op.matmul(a, b), (32, 64), (64, 64))
    module = module_from_body(task.workload.body)
    for target, lanes in ((LLVM, 4), (AVX512, 16)):
        text = fallback_schedule(module, parse_target(target)).mod.script()
        assert f"T.vectorized({lanes})" in text.replace("T.int64(", "").replace("))", ")"), text


@pytest.mark.parametrize("name", ["conv2d, wide rows", "dense", "max_pool2d", "softmax", "add", "transpose"])
def test_gpu_fallback_binds_threads_and_replays(name: str) -> None:
    import tvm_ffi

    target = parse_target(CUDA)
    module = module_from_body(OPERATORS[name]().workload.body)
    schedule = fallback_schedule(module, target)
    assert "threadIdx.x" in schedule.mod.script()
    trace = trace_to_json(schedule)
    assert not is_empty(trace)
    assert tvm_ffi.structural_equal(apply_trace(module, trace).mod, schedule.mod)
