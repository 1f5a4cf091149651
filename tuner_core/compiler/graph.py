"""TVM-FFI's JSON object graphs: how they are loaded, and which fields of a node refer to other nodes."""

from __future__ import annotations

import json
from typing import Any

from tuner_core.compiler.tvm_setup import TVM_PIN

_RAW_FIELD_TYPES = frozenset({0, 1, 2, 3})  # TVM-FFI's None, int, bool, float: stored in place, not as a node index
_raw_fields: dict[str, frozenset[str]] = {}


def is_reference(kind: str, name: str, value: Any) -> bool:
    """Whether a field of an object node holds a node index; ints are told apart by the field's type in reflection.

    Args:
        kind: Type key of the node.
        name: The field.
        value: What the JSON holds.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    if kind not in _raw_fields:
        from tvm_ffi import core

        info = core._lookup_or_register_type_info_from_type_key(kind)
        raw: set[str] = set()
        while info is not None:
            raw.update(field.name for field in info.fields or () if field.field_static_type_index in _RAW_FIELD_TYPES)
            info = info.parent_type_info
        _raw_fields[kind] = frozenset(raw)
    return name not in _raw_fields[kind]


def references(node: dict[str, Any]) -> list[int]:
    """Indices of the nodes that a node refers to, in the order in which they stand."""
    kind, data = node["type"], node.get("data")
    if kind in ("ffi.Array", "ffi.List", "ffi.Map", "ffi.Dict"):
        return list(data or ())
    if isinstance(data, dict):
        return [value for name, value in data.items() if is_reference(kind, name, value)]
    return []


def load_graph(text: str) -> Any:
    """What ``tvm.ir.load_json`` gives, in a fraction of its time where this TVM wrote the text.

    TVM looks for what older versions wrote and writes the graph again with line breaks, which Python's fast encoder
    cannot: 0.2 s for a model. It is written again here as well: TVM's own parser then sees the graph that a check in
    Python has seen, whatever the text holds twice.

    Args:
        text: The JSON.

    Raises:
        Exception: Whatever TVM's loader trips over.
    """
    import tvm
    from tvm_ffi.serialization import from_json_graph_str

    graph = json.loads(text)
    metadata = graph.get("metadata")
    if isinstance(metadata, dict) and metadata.get("tvm_version") == TVM_PIN:
        return from_json_graph_str(json.dumps(graph))
    return tvm.ir.load_json(text)
