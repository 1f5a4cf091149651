"""IR and traces from outside: what real models need passes, everything else is refused before TVM sees it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.integration.compiler_operators import CUDA, LLVM, heaviest, prepared
from tests.integration.test_cpu_fallback import OPERATORS
from tests.light_models import light_model
from tuner_client.model.load import load_model
from tuner_client.model.prepare import parse_target, prepare
from tuner_core.compiler.apply import apply_schedules
from tuner_core.compiler.executable import build_executable
from tuner_core.compiler.fallback import fallback_schedule
from tuner_core.compiler.guard import (
    MAX_TRACE_BYTES,
    MAX_WORKLOAD_BYTES,
    check_module,
    check_trace,
    load_lifted_module,
    load_workload,
)
from tuner_core.compiler.trace import trace_to_json
from tuner_core.compiler.tvm_setup import load_tvm
from tuner_core.compiler.workload import module_from_body, workload_from_module
from tuner_core.errors import UsageError


@pytest.fixture(scope="module")
def body() -> str:
    return heaviest(lambda op, a, b: op.matmul(a, b), (16, 32), (32, 16)).workload.body


@pytest.mark.parametrize("name", ["squeezenet", "shufflenet"])
def test_real_models_pass(name: str) -> None:
    model = prepare(load_model(light_model(name)).module, LLVM)
    load_lifted_module(model.lifted_json)
    for task in model.tasks:
        load_workload(task.workload.body)


@pytest.mark.parametrize("name", ["softmax", "layer_norm", "argmax", "cumsum", "topk", "depthwise", "scalar"])
def test_operators_and_their_schedules_pass(name: str) -> None:
    body = OPERATORS[name]().workload.body
    load_workload(body)
    check_trace(trace_to_json(fallback_schedule(module_from_body(body), parse_target(LLVM))))


SORTS_AND_SCANS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "argsort": (lambda op, x: op.argsort(x, axis=0, descending=True), (8, 40)),
    "sort": (lambda op, x: op.sort(x, axis=-1), (8, 40)),
    "topk": (lambda op, x: op.topk(x, k=5, ret_type="values"), (8, 40)),
    "cumsum, last axis": (lambda op, x: op.cumsum(x, axis=1), (8, 40)),
    "cumsum, middle axis": (lambda op, x: op.cumsum(x, axis=1), (2, 8, 40)),
    "cumprod": (lambda op, x: op.cumprod(x, axis=0), (8, 40)),
    "bucketize": (lambda op, x: op.bucketize(x, op.arange(0, 9, 1, "float32")), (8, 40)),
}


@pytest.mark.parametrize("name", SORTS_AND_SCANS)
def test_sorts_and_scans_for_gpus_pass_and_build(name: str) -> None:
    operator, shape = SORTS_AND_SCANS[name]
    model = prepared(operator, shape, target=CUDA)
    lifted = load_lifted_module(model.lifted_json)
    for task in model.tasks:
        load_workload(task.workload.body)
    scheduled, coverage = apply_schedules(lifted, parse_target(CUDA), {})
    assert coverage.fallback
    build_executable(scheduled, parse_target(CUDA))


def bound(key: str, node: Any, value: Any = 1) -> Any:
    """A one-loop operator under an attribute statement."""
    from tvm import tirx

    function = compute(lambda x, i: x + 1.0)
    return function.with_body(tirx.AttrStmt(node, key, tirx.IntImm("int32", value), function.body))


def test_only_threads_may_be_bound_by_attributes() -> None:
    import tvm
    from tvm import ir, tirx

    def axis(tag: str) -> Any:
        return tirx.IterVar(None, tirx.Var("t", "int32"), tirx.IterVar.ThreadIndex, tag)

    check_module(tvm.IRModule({"main": bound("thread_extent", axis("threadIdx.x"))}))
    check_module(tvm.IRModule({"main": bound("hand_threaded", tirx.IntImm("int32", 0))}))
    refused = {
        "pragma_import_c": ir.StringImm("int x;"),
        "pragma_import_llvm": ir.StringImm("x"),
        "extern_scope": tirx.IntImm("int32", 0),
        "compute_scope": ir.StringImm("evil"),
        "device_scope": tirx.IntImm("int32", 0),
        "hand_threaded": ir.StringImm("x"),
        "thread_extent": axis("blockIdx.x; evil"),
    }
    for key, node in refused.items():
        with pytest.raises(UsageError, match=r"attribute|threads of"):
            check_module(tvm.IRModule({"main": bound(key, node)}))


def test_runtime_functions_other_than_reshape_are_refused() -> None:
    import tvm
    from tvm import relax

    def calling(name: str) -> Any:
        builder = relax.BlockBuilder()
        x = relax.Var("x", relax.TensorType((4,), "float32"))
        with builder.function("main", [x]):
            with builder.dataflow():
                call = relax.call_pure_packed(name, x, relax.ShapeExpr([4]), ty_args=x.ty)
                result = builder.emit_output(call)
            builder.emit_func_output(result)
        return builder.get()

    load_lifted_module(tvm.ir.save_json(calling("vm.builtin.reshape")))
    for name in ("runtime.SystemLib", "vm.builtin.read_if_cond", "ffi.Module.load_from_file.so"):
        with pytest.raises(UsageError, match=f"calls {name}"):
            load_lifted_module(tvm.ir.save_json(calling(name)))
    forged = tvm.ir.save_json(calling("vm.builtin.reshape")).replace("tvm.relax.type.infer_by_ty_args", "os.system")
    with pytest.raises(UsageError, match=r"names the function os\.system"):
        load_lifted_module(forged)


def compute(expression: Any) -> Any:
    """A one-loop operator whose element is ``expression(A[i], i)``."""
    load_tvm()
    from tvm import te

    a = te.placeholder((8,), name="A")
    b = te.compute((8,), lambda i: expression(a[i], i), name="B")
    return te.create_prim_func([a, b])


def test_calls_of_the_host_are_refused() -> None:
    load_tvm()
    from tvm import tirx

    expressions = {
        "call_extern": lambda x, i: tirx.call_extern("float32", "system", x),
        "call_pure_extern": lambda x, i: tirx.call_pure_extern("float32", "system", x),
        "call_packed": lambda x, i: tirx.call_packed("runtime.SystemLib", x),
        "call_llvm": lambda x, i: tirx.call_llvm_pure_intrin("float32", "llvm.sqrt", x),
    }
    for name, expression in expressions.items():
        with pytest.raises(UsageError, match="calls (tirx|runtime)"):
            check_module(module_from_body(workload_from_module(compute(expression)).body))
        with pytest.raises(UsageError):
            load_workload(workload_from_module(compute(expression)).body), name


def test_pragmas_that_import_code_are_refused() -> None:
    from tvm import IRModule
    from tvm.s_tir import Schedule

    load_tvm()
    for pragma in ("pragma_import_c", "pragma_import_llvm"):
        schedule = Schedule(IRModule({"main": compute(lambda x, i: x + 1.0)}))
        schedule.annotate(schedule.get_loops(schedule.get_sblock("B"))[0], pragma, "int x;")
        with pytest.raises(UsageError, match=f"annotation {pragma}"):
            check_module(schedule.mod)


def test_attributes_that_name_other_compilers_are_refused() -> None:
    import tvm

    function = compute(lambda x, i: x + 1.0)
    for module in (
        tvm.IRModule({"main": function.with_attr("Codegen", "ccompiler")}),
        tvm.IRModule({"main": function.with_attr("tirx.is_entry_func", True)}),
        tvm.IRModule({"main": function}).with_attr("external_mods", []),
    ):
        with pytest.raises(UsageError, match="attribute"):
            check_module(module)


def test_models_that_call_by_name_are_refused() -> None:
    import tvm
    from tvm import relax

    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4,), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            call = relax.op.call_dps_packed("evil", (x,), out_ty=relax.TensorType((4,), "float32"))
            result = builder.emit_output(call)
        builder.emit_func_output(result)
    with pytest.raises(UsageError):
        check_module(builder.get())
    with pytest.raises(UsageError):
        load_lifted_module(tvm.ir.save_json(builder.get()))


def test_forged_graphs_never_reach_tvms_loader(body: str) -> None:
    graph = json.loads(body)

    def changed(**fields: Any) -> str:
        return json.dumps({**graph, **fields})

    nodes = graph["nodes"]
    cyclic = [dict(node) for node in nodes]
    array = next(number for number, node in enumerate(nodes) if node["type"] == "ffi.Array" and node["data"])
    cyclic[array] = {"type": "ffi.Array", "data": [array]}
    forward = [dict(node) for node in nodes]
    forward[array] = {"type": "ffi.Array", "data": [len(nodes) + 5]}
    for text in (
        "",
        "[]",
        "{}",
        "null",
        changed(root_index=-1),
        changed(root_index=10**9),
        changed(root_index="0"),
        changed(nodes=cyclic),
        changed(nodes=forward),
        changed(nodes={}),
        changed(nodes=[[]]),
        changed(nodes=[{"type": 3}]),
        "[" * 100_000,
    ):
        with pytest.raises(UsageError):
            load_workload(text)
    with pytest.raises(UsageError, match=r"runtime\.Module is not accepted"):
        load_workload(changed(nodes=[*nodes, {"type": "runtime.Module", "data": ""}]))


def test_a_small_graph_that_unfolds_into_a_huge_one_is_refused(body: str) -> None:
    graph = json.loads(body)
    nodes = graph["nodes"]
    prim = next(number for number, node in enumerate(nodes) if node["type"] == "ir.PrimType")
    nodes.append({"type": "int", "data": 1})
    nodes.append({"type": "ir.IntImm", "data": {"span": 0, "ty": prim, "value": len(nodes) - 1}})
    for _ in range(64):
        last = len(nodes) - 1
        nodes.append({"type": "prim.Add", "data": {"span": 0, "ty": prim, "a": last, "b": last}})
    graph["root_index"] = len(nodes) - 1
    with pytest.raises(UsageError, match="too large once"):
        load_workload(json.dumps(graph))


def test_sizes_are_limited(body: str) -> None:
    with pytest.raises(UsageError, match="bytes, more than"):
        load_workload(body + " " * MAX_WORKLOAD_BYTES)
    with pytest.raises(UsageError, match="bytes, more than"):
        check_trace("[" + " " * MAX_TRACE_BYTES + "]")
    huge = heaviest(lambda op, x: op.exp(x), (1 << 16, 1 << 16))
    with pytest.raises(UsageError, match="65536x65536"):
        load_workload(huge.workload.body)


@pytest.mark.parametrize(
    "trace",
    [
        "",
        "{}",
        "[3]",
        '[[["Annotate",["l1","\\"int x;\\""],["pragma_import_c"],[]]],[]]',
        '[[["Annotate",["l1","\\"x\\""],["pragma_import_llvm"],[]]],[]]',
        '[[["Annotate",["b1",{"pragma_import_c":"x"}],["meta_schedule.x"],[]]],[]]',
        '[[["UnsafeSetDType",["b1"],[0,"int8"],[]]],[]]',
    ],
)
def test_traces_that_bring_code_are_refused(trace: str) -> None:
    with pytest.raises(UsageError):
        check_trace(trace)


def test_unrolling_pragmas_pass() -> None:
    check_trace('[[["Annotate",["b1",16],["pragma_auto_unroll_max_step"],[]]],[]]')
