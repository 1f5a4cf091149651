"""Give an ONNX model random weights, and make it a half-precision one.

The light models of the package onnx have weights of 0.02 throughout, made by ConstantOfShape nodes: their outputs do
not depend on their inputs. Correctness needs weights that let the input through: fan-in scaled, and variances positive.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, numpy_helper


def randomise(model: Any, seed: int) -> None:
    """Replace every floating-point weight of a model, in place."""
    rng = np.random.default_rng(seed)
    graph = model.graph
    users = _users(graph)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    kept_nodes, weights = [], {}
    for node in graph.node:
        if node.op_type == "ConstantOfShape" and node.input[0] in constants:
            weights[node.output[0]] = tuple(int(extent) for extent in constants[node.input[0]])
        else:
            kept_nodes.append(node)
    for name, value in constants.items():
        if value.dtype == np.float32 and value.size > 1:
            weights[name] = value.shape
    kept = [tensor for tensor in graph.initializer if tensor.name not in weights]
    made = [numpy_helper.from_array(_weight(name, weights[name], users, rng), name) for name in sorted(weights)]
    inputs = [value for value in graph.input if value.name not in weights]
    del graph.node[:], graph.initializer[:], graph.input[:]
    graph.node.extend(kept_nodes)
    graph.initializer.extend([*kept, *made])
    graph.input.extend(inputs)


def to_float16(model: Any) -> None:
    """Turn every single-precision weight, constant, input and output of a model into half precision, in place."""
    graph = model.graph
    for tensor in graph.initializer:
        _halve(tensor)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _halve(attribute.t)
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16


def _halve(tensor: Any) -> None:
    if tensor.data_type == TensorProto.FLOAT:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float16"), tensor.name))


def _users(graph: Any) -> dict[str, list[tuple[Any, int]]]:
    users: dict[str, list[tuple[Any, int]]] = {}
    for node in graph.node:
        for position, name in enumerate(node.input):
            users.setdefault(name, []).append((node, position))
    return users


def _weight(
    name: str, shape: tuple[int, ...], users: dict[str, list[tuple[Any, int]]], rng: np.random.Generator
) -> np.ndarray:
    node, position = users.get(name, [(None, 0)])[0]
    while node is not None and node.op_type == "Unsqueeze":
        node, position = users[node.output[0]][0]
    kind = node.op_type if node is not None else ""
    if kind == "BatchNormalization" and position == 1 and _ends_a_branch(node, users):
        return rng.uniform(0.1, 0.4, shape).astype("float32")  # or sixteen sums in a row saturate the softmax
    if kind == "Mul" or (kind == "BatchNormalization" and position in (1, 4)):  # scale, variance
        return rng.uniform(0.5, 1.5, shape).astype("float32")
    if len(shape) == 1:
        return (0.1 * rng.standard_normal(shape)).astype("float32")
    deviation = float(np.sqrt(2 / np.prod(shape[1:]))) * (0.3 if kind == "Gemm" else 1)
    return rng.normal(0, deviation, shape).astype("float32")


def _ends_a_branch(node: Any, users: dict[str, list[tuple[Any, int]]]) -> bool:
    return any(user.op_type == "Sum" and position == 0 for user, position in users.get(node.output[0], []))
