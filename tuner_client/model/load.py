"""Read a model's file and import it into Relax, weights as constants."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tuner_core.errors import ModelError, UsageError

if TYPE_CHECKING:
    from tvm.ir import IRModule

PACKAGE = "gpu-autotuner"

log = logging.getLogger(__name__)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ImportedModel:
    """A model as Relax functions, not yet prepared.

    Attributes:
        name: The file's name without its ending.
        digest: sha256 of the file; of the file and its external weights where it has any.
        module: The Relax module; weights are constants.
        kind: ``onnx`` or ``torch``.
        inputs: Shape and dtype per input, in order.
    """

    name: str
    digest: str
    module: IRModule
    kind: str
    inputs: tuple[tuple[str, Shape, str], ...] = ()


def load_model(path: str | Path, input_shapes: Mapping[str, Shape] | None = None) -> ImportedModel:
    """Import an ONNX model or a ``torch.export`` program.

    Args:
        path: A ``.onnx`` or ``.pt2`` file.
        input_shapes: Shapes of inputs whose shapes the model leaves open, by input name.

    Raises:
        ModelError: The file is missing, no model, truncated, or needs an operator that TVM's frontend lacks; an
            input's shape is open, or contradicts the model; torch is missing for a ``.pt2`` file.
        UsageError: ``input_shapes`` names no input of the model, or holds a size below 1.
    """
    path = Path(path)
    shapes = {name: tuple(int(extent) for extent in shape) for name, shape in (input_shapes or {}).items()}
    for name, shape in shapes.items():
        if any(extent < 1 for extent in shape):
            raise UsageError(f"--input-shape {name}={format_shape(shape)}: sizes must be at least 1")
    if not path.exists():
        raise ModelError(f"{path}: no such file")
    if not path.is_file():
        raise ModelError(f"{path} is not a file")
    kind = path.suffix.lower()
    if kind == ".onnx":
        from tuner_client.model.onnx_file import import_onnx

        return import_onnx(path, shapes)
    if kind == ".pt2":
        from tuner_client.model.torch_file import import_torch

        return import_torch(path, shapes)
    raise ModelError(f"{path.name}: unknown kind of model; expected .onnx or .pt2 (made by torch.export.save)")


def check_names(shapes: Mapping[str, Shape], inputs: Mapping[str, object]) -> None:
    """Refuse shapes for inputs that the model does not have.

    Raises:
        UsageError: Naming the model's inputs.
    """
    for name in shapes:
        if name not in inputs:
            known = ", ".join(inputs) or "none"
            raise UsageError(f"--input-shape: the model has no input {name!r}; its inputs: {known}")


def fixed_shape(name: str, declared: tuple[int | str, ...] | None, given: Shape | None) -> Shape:
    """The shape to import an input with.

    Args:
        name: The input's name.
        declared: What the model says; open sizes as text. None: not even the rank is known.
        given: What the user says, or None.

    Raises:
        ModelError: A size is open and not given, or given and contradicted by the model.
    """
    if given is None:
        if declared is not None and all(isinstance(extent, int) for extent in declared):
            return tuple(extent for extent in declared if isinstance(extent, int))
        example = ",".join(str(extent) if isinstance(extent, int) else "N" for extent in declared or ("N",))
        known = f" ({format_shape(declared)})" if declared else ""
        raise ModelError(f"input {name!r} has no fixed shape{known}: give it with --input-shape {name}={example}")
    if declared is not None:
        agrees = len(declared) == len(given) and all(
            not isinstance(extent, int) or extent == wanted for extent, wanted in zip(declared, given, strict=True)
        )
        if not agrees:
            raise ModelError(
                f"--input-shape {name}={','.join(map(str, given))}: the model has {format_shape(declared)} for {name!r}"
            )
    return given


def format_shape(shape: tuple[int | str, ...]) -> str:
    """A shape as people write it: ``1x3x224x224``."""
    return "x".join(str(extent) for extent in shape) or "scalar"


def one_line(error: BaseException) -> str:
    """The last line of an error's text: TVM puts a stack trace before it."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
