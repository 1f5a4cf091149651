"""Applying records to a prepared model: N of N, right, and loadable by stock TVM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.compiler_operators import CUDA, LLVM, conv, prepared
from tests.light_models import light_model, varied_inputs, write_random_model
from tuner_client.model.load import load_model
from tuner_client.model.prepare import Prepared, parse_target, prepare
from tuner_core.compiler.apply import apply_schedules
from tuner_core.compiler.executable import build_executable, export_executable
from tuner_core.compiler.trace import apply_trace, trace_to_json
from tuner_core.compiler.workload import digest_of, module_from_body
from tuner_core.errors import InvalidRecordError, TunerError

RESOLUTION = 64


def sampled_trace(body: str, seed: int) -> str:
    """A trace from MetaSchedule's own space, as search finds them."""
    from tvm.s_tir import meta_schedule as ms

    module = module_from_body(body)
    context = ms.TuneContext(
        module,
        target=parse_target(LLVM),
        space_generator="post-order-apply",
        search_strategy="evolutionary",
        task_name="sample",
        rand_state=seed,
        num_threads=1,
    )
    return trace_to_json(context.generate_design_space()[0])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    path = write_random_model("squeezenet", tmp_path_factory.mktemp("model"), resolution=RESOLUTION)
    return prepare(load_model(path).module, LLVM)


@pytest.fixture(scope="module")
def traces(model: Prepared) -> dict[str, str]:
    return {task.workload.digest: sampled_trace(task.workload.body, 5) for task in model.tasks if task.tunable}


@pytest.fixture(scope="module")
def inputs() -> list[np.ndarray]:
    return varied_inputs((1, 3, RESOLUTION, RESOLUTION), 2)


def outputs(executable: Any, inputs: list[np.ndarray], weights: Any = ()) -> list[np.ndarray]:
    import tvm
    from tvm import relax

    machine = relax.VirtualMachine(executable, tvm.cpu())
    return [machine["main"](tvm.runtime.tensor(value), *weights).numpy() for value in inputs]


@pytest.fixture(scope="module")
def reference(model: Prepared, inputs: list[np.ndarray]) -> list[np.ndarray]:
    return outputs(build_executable(model.module, parse_target(LLVM)), inputs)


def test_every_record_is_applied_and_outputs_stay(
    model: Prepared,
    traces: dict[str, str],
    inputs: list[np.ndarray],
    reference: list[np.ndarray],
    tmp_path: Path,
) -> None:
    target = parse_target(LLVM)
    scheduled, coverage = apply_schedules(model.module, target, traces)
    assert len(coverage.tuned) == len(traces) == sum(task.tunable for task in model.tasks)
    assert coverage.total == len(model.tasks)
    assert coverage.total_calls == sum(task.weight for task in model.tasks)
    assert coverage.tuned_calls == sum(task.weight for task in model.tasks if task.tunable)
    assert not coverage.invalid and not coverage.unused
    executable = build_executable(scheduled, target)
    for given, wanted in zip(outputs(executable, inputs), reference, strict=True):
        np.testing.assert_allclose(given, wanted, rtol=1e-3, atol=1e-6)
    assert np.abs(reference[0] - reference[1]).max() > 1e-5, "these weights let the input through"

    path = export_executable(executable, tmp_path / "tuned.so")
    np.savez(tmp_path / "io.npz", x=inputs[0], y=reference[0])
    stock = (
        "import sys, numpy as np, tvm; from tvm import relax; io = np.load(sys.argv[2]);"
        "vm = relax.VirtualMachine(tvm.runtime.load_module(sys.argv[1]), tvm.cpu());"
        "np.testing.assert_allclose(vm['main'](tvm.runtime.tensor(io['x'])).numpy(), io['y'], rtol=1e-3, atol=1e-6);"
        "assert not [name for name in sys.modules if name.startswith('tuner_')]"
    )
    command = [sys.executable, "-c", stock, str(path), str(tmp_path / "io.npz")]
    subprocess.run(command, check=True, timeout=120, cwd=tmp_path)


def test_lifted_model_with_its_weights_computes_the_same(
    model: Prepared, traces: dict[str, str], inputs: list[np.ndarray], reference: list[np.ndarray]
) -> None:
    import tvm

    target = parse_target(LLVM)
    scheduled, coverage = apply_schedules(tvm.ir.load_json(model.lifted_json), target, traces)
    assert len(coverage.tuned) == len(traces)
    given = outputs(build_executable(scheduled, target), inputs, model.weights)
    np.testing.assert_allclose(given[0], reference[0], rtol=1e-3, atol=1e-6)
    main = scheduled["main"]
    assert int(main.attrs["num_input"]) == 1
    assert len(main.params) == 1 + len(model.weights)


def test_fallback_of_a_whole_model_computes_the_same(
    model: Prepared, inputs: list[np.ndarray], reference: list[np.ndarray]
) -> None:
    target = parse_target(LLVM)
    scheduled, coverage = apply_schedules(model.module, target, {})
    assert not coverage.tuned and len(coverage.fallback) == len(model.tasks) and coverage.tuned_calls == 0
    for given, wanted in zip(outputs(build_executable(scheduled, target), inputs), reference, strict=True):
        np.testing.assert_allclose(given, wanted, rtol=1e-3, atol=1e-6)
    assert "T.parallel" in scheduled.script()


def test_prepared_module_stays_as_it_was(model: Prepared) -> None:
    import tvm_ffi

    before = tvm_ffi.structural_hash(model.module)
    apply_schedules(model.module, parse_target(LLVM), {})
    assert tvm_ffi.structural_hash(model.module) == before


def test_records_that_do_not_fit_are_named_and_replaced(model: Prepared, traces: dict[str, str]) -> None:
    first, second = [task for task in model.tasks if task.tunable][:2]
    pool = next(task for task in model.tasks if "pool" in task.workload.op)
    given = {
        pool.workload.digest: traces[first.workload.digest],  # of another operator
        second.workload.digest: "[[],[]]",  # schedules nothing
        "0" * 64: traces[first.workload.digest],  # no such operator here
    }
    _, coverage = apply_schedules(model.module, parse_target(LLVM), given)
    assert set(coverage.invalid) == {pool.name}
    assert "does not apply" in coverage.invalid[pool.name]
    assert not coverage.tuned and {pool.name, second.name} <= set(coverage.fallback)
    assert coverage.unused == ("0" * 64,)


def test_functions_that_differ_in_block_names_only_share_a_record() -> None:
    """TVM merges them into one task; each has a digest of its own."""
    import tvm
    import tvm_ffi

    shapes = ((1, 8, 14, 14), (8, 8, 3, 3))
    model = prepared(lambda op, x, w: conv(op, x, w, padding=(1, 1)), *shapes)
    (task,) = model.tasks
    renamed = tvm.ir.load_json(tvm.ir.save_json(model.module).replace("conv2d_nchw", "conv2d_nhcw"))
    both = tvm.IRModule(dict(model.module.functions.items()))
    function = next(f for f in renamed.functions.values() if isinstance(f, tvm.tirx.PrimFunc))
    both.update_func(tvm.ir.GlobalVar("twin"), function)
    assert digest_of(function) != task.workload.digest
    scheduled, coverage = apply_schedules(
        both, parse_target(LLVM), {task.workload.digest: sampled_trace(task.workload.body, 1)}
    )
    assert coverage.tuned == tuple(sorted([task.name, "twin"]))
    assert tvm_ffi.structural_equal(scheduled["twin"], scheduled[task.name], map_free_vars=True)


def test_functions_keep_their_attributes(model: Prepared, traces: dict[str, str]) -> None:
    import tvm

    scheduled, _ = apply_schedules(model.module, parse_target(LLVM), traces)
    for var, function in model.module.functions.items():
        if isinstance(function, tvm.tirx.PrimFunc):
            after = dict(scheduled[var.name_hint].attrs.items())
            assert after.pop("tirx.is_scheduled")
            assert after == dict(function.attrs.items())


def test_gpu_model_is_scheduled_completely() -> None:
    import tvm

    model = prepare(load_model(light_model("squeezenet")).module, CUDA)
    scheduled, coverage = apply_schedules(model.module, parse_target(CUDA), {})
    assert len(coverage.fallback) == len(model.tasks)
    called = scheduled["main"].script()
    for var, function in scheduled.functions.items():
        if isinstance(function, tvm.tirx.PrimFunc) and f"({var.name_hint}," in called.replace("cls.", ""):
            assert "threadIdx.x" in function.script(), var.name_hint


def test_a_trace_that_binds_no_threads_is_not_used_on_a_gpu() -> None:
    model = prepared(lambda op, a, b: op.matmul(a, b), (64, 64), (64, 64), target=CUDA)
    (task,) = model.tasks
    for_cpu = sampled_trace(task.workload.body, 1)
    scheduled, coverage = apply_schedules(model.module, parse_target(CUDA), {task.workload.digest: for_cpu})
    assert not coverage.tuned and "binds no threads" in coverage.invalid[task.name]
    assert "threadIdx.x" in scheduled[task.name].script()


@pytest.mark.parametrize(
    "trace",
    [
        "",
        "{",
        "{}",
        "[]",
        "[[],[],[]]",
        '[[["NoSuchInstruction",[],[],[]]],[]]',
        '[[["GetSBlock",[],["gone","main"],["b0"]]],[]]',
    ],
)
def test_bad_traces_are_refused(trace: str) -> None:
    model = prepared(lambda op, a, b: op.matmul(a, b), (16, 32), (32, 16))
    with pytest.raises(InvalidRecordError):
        apply_trace(module_from_body(model.tasks[0].workload.body), trace)


def test_trace_equals_what_tvms_tuning_record_holds() -> None:
    from tvm.s_tir import meta_schedule as ms

    model = prepared(lambda op, a, b: op.matmul(a, b), (16, 32), (32, 16))
    module = module_from_body(model.tasks[0].workload.body)
    schedule = apply_trace(module, sampled_trace(model.tasks[0].workload.body, 2))
    record = ms.database.TuningRecord(schedule.trace, ms.database.Workload(module), [1.0], parse_target(LLVM))
    assert json.loads(trace_to_json(schedule)) == json.loads(
        json.dumps(record.as_json()[0], default=lambda constant: constant.value)
    )


def test_model_that_cannot_be_written_or_built_is_one_line(model: Prepared, tmp_path: Path) -> None:
    target = parse_target(LLVM)
    small = prepared(lambda op, x: op.exp(x), (4,))
    executable = build_executable(apply_schedules(small.module, target, {})[0], target)
    with pytest.raises(TunerError, match="is not a directory"):
        export_executable(executable, tmp_path / "absent" / "m.so")
    absent = parse_target('{"kind":"vulkan"}')  # this TVM is built without it
    with pytest.raises(TunerError) as caught:
        build_executable(apply_schedules(small.module, absent, {})[0], absent)
    assert str(caught.value).startswith("the model cannot be compiled for vulkan") and "\n" not in str(caught.value)
