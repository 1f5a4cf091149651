"""Workloads: one operator as a normalised IRModule, its canonical JSON and its digest.

TVM's own JSON graph depends on the names of variables and on which equal objects happen to be shared in memory. Here
the graph is written again from its root: variables are named in the order in which they are met, equal values become
one node, maps are sorted and source spans dropped. Names of blocks stay: traces refer to them.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tuner_core.compiler.graph import is_reference, load_graph
from tuner_core.compiler.tvm_setup import load_tvm
from tuner_core.errors import InvalidRecordError
from tuner_core.model import Workload, canonical_json, sha256_hex

if TYPE_CHECKING:
    from tvm.ir import IRModule
    from tvm.tirx import PrimFunc

_VARIABLES = frozenset({"ir.Var", "tirx.Var", "tirx.SizeVar", "relax.expr.Var", "relax.expr.DataflowVar"})
_SHARED_TYPES = frozenset(
    {
        "None", "int", "bool", "float", "DataType", "Device", "ir.IntImm", "ir.FloatImm", "ir.StringImm", "ir.Op",
        "ir.Call", "ir.Range", "ir.Tuple", "ir.DictAttrs", "ir.TensorLoad", "ir.TensorRegion", "relax.expr.ShapeExpr",
    }
)  # fmt: skip
_SHARED_PREFIXES = ("ffi.", "prim.", "ir.prim.")


def normalise(mod: IRModule | PrimFunc) -> IRModule:
    """The module that TVM's task extraction and database look-ups make of a function: one function called ``main``.

    Args:
        mod: A PrimFunc, or a module that holds exactly one.

    Raises:
        InvalidRecordError: The module holds no function, or several.
    """
    load_tvm()
    import tvm
    from tvm_ffi import get_global_func

    _register_normaliser()
    if isinstance(mod, tvm.IRModule):
        functions = list(mod.functions.values())
        if len(functions) != 1 or not isinstance(functions[0], tvm.tirx.PrimFunc):
            raise InvalidRecordError(
                f"a workload is a module with one TIR function, not with {len(functions)} functions"
            )
        mod = functions[0]
    return get_global_func("tvm.s_tir.meta_schedule.normalize_mod")(mod)


def workload_from_module(mod: IRModule | PrimFunc) -> Workload:
    """The workload of an operator, with its description.

    Args:
        mod: A module with one PrimFunc, or the PrimFunc.

    Raises:
        InvalidRecordError: Not exactly one function.
    """
    from tuner_core.compiler.describe import describe

    normalised = normalise(mod)
    import tvm_ffi
    from tvm.s_tir.meta_schedule.arg_info import ArgInfo

    body = canonical_body(normalised)
    op, description = describe(normalised)
    args = tuple(
        (str(kind), str(dtype), tuple(int(extent) for extent in shape))
        for kind, dtype, shape in (_plain(info.as_json()) for info in ArgInfo.from_prim_func(normalised["main"]))
    )
    return Workload(
        digest=sha256_hex(body),
        body=body,
        structural_hash=str(tvm_ffi.structural_hash(normalised) & 0xFFFFFFFFFFFFFFFF),
        op=op,
        description=description,
        args_info=args,
    )


def digest_of(function: IRModule | PrimFunc) -> str:
    """Digest of the workload that a function is, without the cost of describing it."""
    return sha256_hex(canonical_body(normalise(function)))


def canonical_module(function: IRModule | PrimFunc) -> IRModule:
    """What a trace is replayed on: the module as every server had it.

    Schedules for tensor cores name new blocks after buffers, and find them by these names later; a model's own module
    has other names for its buffers than the workload that was measured.
    """
    return module_from_body(canonical_body(normalise(function)))


def module_from_body(body: str) -> IRModule:
    """The module of a workload's canonical JSON.

    Raises:
        InvalidRecordError: Not the JSON of a module with one PrimFunc called ``main``.
    """
    load_tvm()
    import tvm

    try:
        mod = load_graph(body)
    except Exception as error:  # TVM raises anything from KeyError to InternalError here
        raise InvalidRecordError(f"a workload's body cannot be read: {_first_line(error)}") from None
    if not isinstance(mod, tvm.IRModule) or [var.name_hint for var in mod.get_global_vars()] != ["main"]:
        raise InvalidRecordError("a workload's body is not a module with one function called main")
    if not isinstance(mod["main"], tvm.tirx.PrimFunc):
        raise InvalidRecordError("a workload's main is not a TIR function")
    return mod


def canonical_body(mod: IRModule) -> str:
    """Canonical JSON of a module: independent of variable names, of object sharing and of the process.

    Args:
        mod: A normalised module.
    """
    import tvm

    return canonical_json(_Canonical(json.loads(tvm.ir.save_json(mod))).graph())


class _Canonical:
    """Rewrites one JSON graph. Iterative: expressions may nest deeper than Python's stack."""

    def __init__(self, graph: dict[str, Any]) -> None:
        self._source: list[dict[str, Any]] = graph["nodes"]
        self._root: int = graph["root_index"]
        self._metadata = graph.get("metadata", {})
        self._nodes: list[dict[str, Any]] = []
        self._index: dict[int, int] = {}
        self._known: dict[str, int] = {}
        self._variables = 0

    def graph(self) -> dict[str, Any]:
        """The canonical graph."""
        self._constant({"type": "None"})
        stack: list[tuple[int, bool]] = [(self._root, False)]
        while stack:
            index, children_done = stack.pop()
            if index in self._index:
                continue
            node = self._source[index]
            if children_done:
                self._index[index] = self._emit(node)
                continue
            stack.append((index, True))
            stack.extend((child, False) for child in reversed(self._children(node)))
        return {"root_index": self._index[self._root], "nodes": self._nodes, "metadata": self._metadata}

    def _children(self, node: dict[str, Any]) -> list[int]:
        kind: str = node["type"]
        data: Any = node.get("data")
        if kind in ("ffi.Map", "ffi.Dict"):
            return [index for pair in self._sorted_pairs(data) for index in pair]
        if kind in ("ffi.Array", "ffi.List"):
            return list(data)
        if isinstance(data, dict):
            skip = {"span", "name"} if kind in _VARIABLES else {"span"}
            return [data[name] for name in data if name not in skip and is_reference(kind, name, data[name])]
        return []

    def _emit(self, node: dict[str, Any]) -> int:
        kind: str = node["type"]
        data: Any = node.get("data")
        if kind in ("ffi.Map", "ffi.Dict"):
            return self._value(kind, [self._index[index] for pair in self._sorted_pairs(data) for index in pair])
        if kind in ("ffi.Array", "ffi.List"):
            return self._value(kind, [self._index[index] for index in data])
        if not isinstance(data, dict):
            return self._constant(node)
        fields = {
            name: self._index[value] if name not in ("span", "name") and is_reference(kind, name, value) else value
            for name, value in data.items()
        }
        if "span" in fields:
            fields["span"] = 0
        if kind in _VARIABLES:
            fields["name"] = self._constant({"type": "ffi.String", "data": f"v{self._variables}"})
            self._variables += 1
        elif "name" in fields and is_reference(kind, "name", data["name"]):
            fields["name"] = self._constant(self._source[data["name"]])
        return self._value(kind, fields)

    def _sorted_pairs(self, data: list[int]) -> list[tuple[int, int]]:
        pairs = list(zip(data[::2], data[1::2], strict=True))
        if all(self._source[key]["type"] == "ffi.String" for key, _ in pairs):
            pairs.sort(key=lambda pair: str(self._source[pair[0]]["data"]))
        return pairs

    def _value(self, kind: str, data: Any) -> int:
        node = {"type": kind, "data": data}
        if kind in _SHARED_TYPES or kind.startswith(_SHARED_PREFIXES) or kind.endswith("Type"):
            return self._constant(node)
        self._nodes.append(node)
        return len(self._nodes) - 1

    def _constant(self, node: dict[str, Any]) -> int:
        key = canonical_json(node)
        if key not in self._known:
            self._nodes.append(node)
            self._known[key] = len(self._nodes) - 1
        return self._known[key]


def _register_normaliser() -> None:
    # importing the package registers the global function
    import tvm.s_tir.meta_schedule  # noqa: F401


def _plain(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
