"""Models of one or two operators, small enough to be tuned in a test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def write_tiny_cnn(path: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """A convolution, a ReLU, an average and a matrix product, from 1x16x28x28 to 1x16.

    Returns:
        Its weights by name.
    """
    rng = np.random.default_rng(seed)
    weights = {
        "kernel": (rng.standard_normal((32, 16, 3, 3)) / 12).astype("float32"),
        "dense": rng.standard_normal((32, 16)).astype("float32"),
    }
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["conv"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("GlobalAveragePool", ["relu"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("MatMul", ["flat", "dense"], ["y"]),
    ]
    _save(path, nodes, [1, 16, 28, 28], [1, 16], weights)
    return weights


def write_nothing_to_tune(path: Path) -> None:
    """A ReLU: no reduction, so nothing is worth trials."""
    _save(path, [helper.make_node("Relu", ["x"], ["y"])], [1, 8], [1, 8], {})


def write_open_shape(path: Path) -> None:
    """A matrix product whose batch size is open."""
    weights = {"w": np.ones((8, 4), "float32")}
    _save(path, [helper.make_node("MatMul", ["x", "w"], ["y"])], ["batch", 8], ["batch", 4], weights)


def _save(
    path: Path,
    nodes: list[onnx.NodeProto],
    given: list[int | str],
    wanted: list[int | str],
    weights: dict[str, np.ndarray],
) -> None:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, given)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, wanted)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), str(path))
