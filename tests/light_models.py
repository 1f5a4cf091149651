"""The real models that come with the onnx package, as they are or with seeded random weights, fp32 or fp16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from examples.random_weights import randomise, to_float16

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


def write_random_model(
    name: str, folder: Path, *, seed: int = 0, resolution: int | None = None, dtype: str = "float32"
) -> Path:
    """Write a light model with seeded random weights.

    Args:
        name: As for :func:`light_model`.
        folder: Where to.
        seed: Equal seeds give equal files.
        resolution: Height and width of the input instead of 224; only for models without a dense layer (squeezenet).
        dtype: ``float32``, or ``float16`` for weights, inputs and outputs.

    Returns:
        The file; its outputs depend on the input.
    """
    model = onnx.load(str(light_model(name)))
    randomise(model, seed)
    if resolution is not None:
        _resize(model, resolution)
    if dtype == "float16":
        to_float16(model)
    path = folder / f"{name}.onnx"
    onnx.save(model, str(path))
    return path


def varied_inputs(shape: tuple[int, ...], count: int, seed: int = 3) -> list[np.ndarray]:
    """Seeded images in [0.1, 1) that differ in their coarse structure too: averages over noise would be all alike."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        coarse = rng.uniform(0, 1, (*shape[:2], 4, 4)).repeat(-(-shape[2] // 4), 2).repeat(-(-shape[3] // 4), 3)
        noise = rng.uniform(0, 1, shape)
        images.append((0.1 + 0.9 * coarse[:, :, : shape[2], : shape[3]] * noise).astype("float32"))
    return images


def _resize(model: Any, resolution: int) -> None:
    weights = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        if value.name not in weights and len(value.type.tensor_type.shape.dim) == 4:
            shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            resized = helper.make_tensor_value_info(
                value.name, value.type.tensor_type.elem_type, [*shape[:2], resolution, resolution]
            )
            value.CopyFrom(resized)
