"""The real models that come with the onnx package, as they are or with seeded random weights.

Their weights are all 0.02, made by ConstantOfShape nodes: outputs do not depend on the input. Correctness needs weights
that let it through: fan-in scaled, and variances positive.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

TASKS_AND_CALLS = {
    "bvlc_alexnet": (20, 21),
    "densenet121": (188, 242),
    "inception_v1": (79, 91),
    "inception_v2": (61, 97),
    "resnet50": (41, 92),
    "shufflenet": (39, 104),
    "squeezenet": (30, 41),
    "vgg19": (20, 28),
    "zfnet512": (19, 21),
}
"""Per model: how many tasks it has, and how many calls they stand for."""


def light_model(name: str) -> Path:
    """The file of a model, e.g. ``squeezenet``."""
    return Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / f"light_{name}.onnx"


def write_random_model(name: str, folder: Path, *, seed: int = 0, resolution: int | None = None) -> Path:
    """Write a light model with seeded random weights.

    Args:
        name: As for :func:`light_model`.
        folder: Where to.
        seed: Equal seeds give equal files.
        resolution: Height and width of the input instead of 224; only for models without a dense layer (squeezenet).

    Returns:
        The file; its outputs depend on the input.
    """
    model = onnx.load(str(light_model(name)))
    randomise(model, seed)
    if resolution is not None:
        _resize(model, resolution)
    path = folder / f"{name}.onnx"
    onnx.save(model, str(path))
    return path


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


def varied_inputs(shape: tuple[int, ...], count: int, seed: int = 3) -> list[np.ndarray]:
    """Seeded images in [0.1, 1) that differ in their coarse structure too: averages over noise would be all alike."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        coarse = rng.uniform(0, 1, (*shape[:2], 4, 4)).repeat(-(-shape[2] // 4), 2).repeat(-(-shape[3] // 4), 3)
        noise = rng.uniform(0, 1, shape)
        images.append((0.1 + 0.9 * coarse[:, :, : shape[2], : shape[3]] * noise).astype("float32"))
    return images


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


def _resize(model: Any, resolution: int) -> None:
    weights = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        if value.name not in weights and len(value.type.tensor_type.shape.dim) == 4:
            shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            resized = helper.make_tensor_value_info(
                value.name, value.type.tensor_type.elem_type, [*shape[:2], resolution, resolution]
            )
            value.CopyFrom(resized)
