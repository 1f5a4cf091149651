"""Checks on IR and traces that come from somebody else, before TVM touches them.

Everything is an allow-list: what a legalised, fused model needs, and nothing else. TVM's sorts and scans for GPUs
come bound to threads; of such statements only that binding is let through. No ``call_extern`` or LLVM
intrinsic, no ``call_packed`` but of TVM's own sorting functions, no ``pragma_*`` that imports code, no attribute that
names an external code generator. The JSON is checked before it is loaded: a forged graph with cycles or bad indices
crashes TVM's loader, and a small graph whose expressions are shared many times over would take it forever. Not a
security boundary by itself: builds and runs happen in separate processes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tuner_core.compiler.graph import load_graph
from tuner_core.compiler.tvm_setup import load_tvm
from tuner_core.errors import UsageError

if TYPE_CHECKING:
    from tvm.ir import IRModule

MAX_WORKLOAD_BYTES = 4 << 20
MAX_MODULE_BYTES = 64 << 20
MAX_TRACE_BYTES = 4 << 20
MAX_BUFFER_ELEMENTS = 1 << 31
_MAX_FUNCTIONS = 8192
_MAX_EXPANDED_NODES = 50_000_000  # with shared nodes counted as often as they are used; ResNet-like models need 200,000

_NODE_TYPES = frozenset(
    {
        "None", "int", "bool", "float", "DataType",
        "ffi.String", "ffi.Array", "ffi.Map", "ffi.Tensor", "ffi.Shape",
        "ir.IRModule", "ir.SourceMap", "ir.DictAttrs", "ir.GlobalVar", "ir.Op", "ir.Call", "ir.Range", "ir.Tuple",
        "ir.TupleGetItem", "ir.Var", "ir.IntImm", "ir.FloatImm", "ir.GenericConst", "ir.TensorLoad", "ir.TensorRegion",
        "ir.Type", "ir.PrimType", "ir.PointerType", "ir.TupleType", "ir.FuncType",
        "tirx.PrimFunc", "tirx.IterVar", "tirx.For", "tirx.SeqStmt", "tirx.BufferStore", "tirx.BufferType",
        "tirx.BufferRegionType", "tirx.IfThenElse", "tirx.Evaluate", "tirx.Bind", "tirx.SizeVar",
        "ir.StringImm", "ir.StringType", "tirx.Axis", "tirx.TileLayout", "tirx.Iter",
        "s_tir.SBlock", "s_tir.SBlockRealize", "s_tir.MatchBufferRegion",
        "tirx.AttrStmt", "tirx.While", "tirx.AllocBuffer", "relax.expr.ExternFunc", "ir.EnvFunc",
        "ir.Span", "ir.SequentialSpan", "ir.SourceName",
        "relax.expr.Function", "relax.expr.SeqExpr", "relax.expr.DataflowBlock", "relax.expr.BindingBlock",
        "relax.expr.VarBinding", "relax.expr.MatchCast", "relax.expr.DataflowVar", "relax.expr.Var",
        "relax.expr.ShapeExpr", "relax.expr.DataTypeImm", "relax.expr.If",
        "relax.TensorType", "relax.ShapeType", "relax.FuncType", "relax.ObjectType", "relax.AnyType",
    }
)  # fmt: skip
_NODE_PREFIXES = ("prim.",)
_CALLS = frozenset(
    {"relax.call_tir", "relax.reshape", "prim.if_then_else", "prim.likely", "prim.clz", "prim.ceil", "prim.log2"}
    | {
        f"tirx.{name}"
        for name in (  # noqa: SIM905
            "abs acos acosh asin asinh atan atan2 atanh ceil clz copysign cos cosh erf exp exp10 exp2 fabs floor fma "
            "fmod hypot isfinite isinf isnan ldexp likely log log10 log1p log2 nearbyint nextafter popcount pow "
            "q_multiply_shift q_multiply_shift_per_axis reinterpret round rsqrt sigmoid sin sinh sqrt tan tanh trunc "
            "bitwise_and bitwise_or bitwise_xor bitwise_not shift_left shift_right vectorhigh vectorlow vectorcombine "
            "vscale dp4a buffer_data tvm_stack_make_array tvm_stack_make_shape"
        ).split()
    }
)
_PACKED = frozenset(f"tvm.contrib.sort.{name}" for name in ("argsort", "sort", "topk", "searchsorted"))
_RUNTIME_FUNCTIONS = frozenset({"vm.builtin.reshape"})  # around TVM's cumsum for GPUs
_TYPE_FUNCTIONS = frozenset({"tvm.relax.type.infer_by_ty_args"})
_THREADS = frozenset(f"{kind}.{axis}" for kind in ("blockIdx", "threadIdx") for axis in "xyz")
_SYNC_SCOPES = frozenset({"shared"})
_SCOPES = frozenset({"", "global", "shared", "local"})
_FUNCTION_ATTRIBUTES = frozenset(
    {"global_symbol", "tirx.noalias", "s_tir", "op_pattern", "num_input", "tirx.is_scheduled", "layout_free_buffers"}
)
_ANNOTATIONS = frozenset({"axis", "schedule_rule", "layout_free_placeholders"})
_TRACE_PRAGMAS = frozenset({"pragma_auto_unroll_max_step", "pragma_unroll_explicit"})
_TRACE_REFUSED = frozenset({"UnsafeSetDType", "EnterPostprocUnsafe", "AnnotateBufferAccess"})


def load_workload(body: str) -> IRModule:
    """A workload's module from JSON of unknown origin.

    Raises:
        UsageError: Too large, malformed, or it holds something that no operator needs.
    """
    check_json(body, MAX_WORKLOAD_BYTES)
    return _load(body)


def load_lifted_module(text: str) -> IRModule:
    """A lifted model from JSON of unknown origin.

    Raises:
        UsageError: As for :func:`load_workload`.
    """
    check_json(text, MAX_MODULE_BYTES)
    return _load(text)


def _load(text: str) -> IRModule:
    load_tvm()
    import tvm

    try:
        module = load_graph(text)
    except Exception as error:  # anything that TVM's loader trips over
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"the IR cannot be read: {lines[-1][:200]}") from None
    if not isinstance(module, tvm.IRModule):
        raise UsageError("the IR is not a module")
    check_module(module)
    return module


def check_json(text: str, max_bytes: int) -> None:
    """Check a JSON graph of TVM objects before loading it.

    Args:
        text: The JSON.
        max_bytes: Limit of its length.

    Raises:
        UsageError: Too large, not a graph whose nodes come after what they refer to, or an unknown kind of node.
    """
    if len(text) > max_bytes:
        raise UsageError(f"the IR has {len(text)} bytes, more than {max_bytes}")
    try:
        graph = json.loads(text)
        nodes, root = graph["nodes"], graph["root_index"]
        sizes = _expanded_sizes(nodes)
        if not isinstance(root, int) or not 0 <= root < len(nodes):
            raise ValueError("no root")
        if sizes[root] > _MAX_EXPANDED_NODES:
            raise UsageError("the IR is too large once its shared expressions are written out")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise UsageError("the IR is not a JSON graph of TVM objects") from None


def _expanded_sizes(nodes: list[Any]) -> list[int]:
    from tuner_core.compiler.graph import references

    load_tvm()
    import tvm.relax
    import tvm.s_tir  # noqa: F401  both register the types of nodes

    if not isinstance(nodes, list):
        raise ValueError("no list of nodes")
    sizes: list[int] = []
    for number, node in enumerate(nodes):
        kind = node["type"]
        if kind not in _NODE_TYPES and not kind.startswith(_NODE_PREFIXES):
            raise UsageError(f"IR with {str(kind)[:80]} is not accepted")
        if kind == "ir.EnvFunc" and node["data"] not in _TYPE_FUNCTIONS:  # loading it looks the name up
            raise UsageError(f"IR that names the function {str(node['data'])[:80]} is not accepted")
        total = 1
        for child in references(node):
            if not 0 <= child < number:
                raise ValueError("not in order")
            total += sizes[child]
        sizes.append(min(total, 2 * _MAX_EXPANDED_NODES))
    return sizes


def check_module(mod: IRModule) -> None:
    """Refuse a module that holds anything but plain loops over buffers and calls of them.

    Args:
        mod: An unscheduled workload, or a lifted model.

    Raises:
        UsageError: Naming what is not accepted.
    """
    load_tvm()
    import tvm
    from tvm import relax

    if len(mod.functions) > _MAX_FUNCTIONS:
        raise UsageError(f"the IR has {len(mod.functions)} functions, more than {_MAX_FUNCTIONS}")
    _refuse("module attribute", _keys(mod.attrs), frozenset())
    _refuse("global info", _keys(mod.global_infos), frozenset())
    for var, function in mod.functions.items():
        if not isinstance(function, tvm.tirx.PrimFunc | relax.Function):
            raise UsageError(f"IR with a {type(function).__name__} is not accepted")
        _refuse("function attribute", _keys(function.attrs), _FUNCTION_ATTRIBUTES)
        if isinstance(function, relax.Function) and var.name_hint != "main":
            raise UsageError(f"a model has one Relax function, main; this one has {var.name_hint}")
        _check_body(function)


def check_trace(trace_json: str) -> None:
    """Refuse a trace that could bring code of its own into a build.

    Args:
        trace_json: JSON of unknown origin.

    Raises:
        UsageError: Too large, malformed, or it annotates a loop with a pragma that imports code.
    """
    if len(trace_json) > MAX_TRACE_BYTES:
        raise UsageError(f"a trace has {len(trace_json)} bytes, more than {MAX_TRACE_BYTES}")
    try:
        instructions = json.loads(trace_json)[0]
        kinds = [str(instruction[0]) for instruction in instructions]
        texts = [text for instruction in instructions for text in _strings(instruction[1:])]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        raise UsageError("a trace is not JSON of instructions and decisions") from None
    for kind in kinds:
        if kind in _TRACE_REFUSED:
            raise UsageError(f"a trace with {kind} is not accepted")
    for text in texts:
        if text.startswith("pragma_") and text not in _TRACE_PRAGMAS:
            raise UsageError(f"a trace with {text[:60]} is not accepted")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value.strip('"')
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _check_body(function: Any) -> None:
    import tvm_ffi
    from tvm import ir, relax, s_tir, tirx

    problems: list[str] = []  # collected: an exception that passes through TVM's walk loses its type

    def check_call(call: Any) -> None:
        name = str(call.op.name) if isinstance(call.op, ir.Op) else type(call.op).__name__
        if name == "tirx.tvm_call_packed":
            packed = str(call.args[0].value) if call.args and isinstance(call.args[0], ir.StringImm) else "?"
            if packed not in _PACKED:
                problems.append(f"that calls {packed[:80]}")
        elif name == "relax.call_pure_packed":
            if not (call.args and isinstance(call.args[0], relax.ExternFunc)):  # which one is checked below
                problems.append("that calls a computed function")
        elif name == "tirx.tvm_storage_sync":
            scopes = [str(argument.value) for argument in call.args if isinstance(argument, ir.StringImm)]
            if len(call.args) != 1 or not _SYNC_SCOPES.issuperset(scopes) or not scopes:
                problems.append("that synchronises more than a block's threads")
        elif name not in _CALLS:
            problems.append(f"that calls {name[:80]}")

    def check_runtime_function(function: Any) -> None:
        if str(function.global_symbol) not in _RUNTIME_FUNCTIONS:
            problems.append(f"that calls {str(function.global_symbol)[:80]}")

    def check_attribute(statement: Any) -> None:
        """TVM's own sorts and scans for GPUs name their threads so; anything else here could import code."""
        key, node = str(statement.attr_key), statement.node
        if key == "thread_extent" and isinstance(node, tirx.IterVar):
            check_thread(node)
        elif key != "hand_threaded" or not isinstance(node, tirx.IntImm | int):
            problems.append(f"with the attribute {key[:80]}")

    def check_thread(axis: Any) -> None:
        if str(axis.thread_tag) not in _THREADS:
            problems.append(f"with threads of {str(axis.thread_tag)[:80]!r}")

    def check_loop(loop: Any) -> None:
        check_annotations(loop)
        if loop.thread_binding is not None:
            check_thread(loop.thread_binding)

    def check_allocation(statement: Any) -> None:
        problems.extend(filter(None, [_size_problem(statement.buffer)]))
        if str(statement.buffer.scope()) not in _SCOPES:
            problems.append(f"with memory of scope {str(statement.buffer.scope())[:80]!r}")
        check_annotations(statement)

    def check_annotations(statement: Any) -> None:
        problems.extend(
            f"with the annotation {key[:80]}" for key in _keys(statement.annotations) if key not in _ANNOTATIONS
        )

    def check_block(block: Any) -> None:
        check_annotations(block)
        problems.extend(filter(None, map(_size_problem, block.alloc_buffers)))

    def refuse(node: Any) -> None:
        problems.append(f"with {type(node).__name__}")

    if isinstance(function, relax.Function):
        tvm_ffi.structural_walk(function, [(ir.Call, check_call), (relax.ExternFunc, check_runtime_function)])
    else:
        problems.extend(filter(None, map(_size_problem, function.params)))
        tvm_ffi.structural_walk(
            function.body,
            [
                (ir.Call, check_call),
                (tirx.For, check_loop),
                (s_tir.SBlock, check_block),
                (tirx.AttrStmt, check_attribute),
                (tirx.AllocBuffer, check_allocation),
                (tirx.AssertStmt, refuse),
            ],
        )
    if problems:
        raise UsageError(f"IR {problems[0]} is not accepted")


def _size_problem(buffer: Any) -> str:
    from tvm import tirx

    shape = getattr(buffer, "shape", ())
    extents = [int(extent) for extent in shape if isinstance(extent, int | tirx.IntImm)]
    if any(extent < 0 for extent in extents) or math.prod(extents) > MAX_BUFFER_ELEMENTS:
        return f"with a buffer of {'x'.join(map(str, extents))} elements"
    return ""


def _keys(attributes: Any) -> list[str]:
    return [str(key) for key in attributes.keys()] if attributes else []  # noqa: SIM118  TVM's attributes are no mapping


def _refuse(what: str, names: list[str], allowed: frozenset[str]) -> None:
    for name in names:
        if name not in allowed:
            raise UsageError(f"IR with the {what} {name[:80]} is not accepted")
