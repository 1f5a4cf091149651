"""ONNX files."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tuner_client.model.load import ImportedModel, Shape, check_names, fixed_shape, one_line
from tuner_core.compiler.tvm_setup import load_tvm
from tuner_core.errors import ModelError

log = logging.getLogger(__name__)

_HANDLED_BY_IMPORTER = frozenset({"If", "Constant"})


def import_onnx(path: Path, shapes: Mapping[str, Shape]) -> ImportedModel:
    """Import an ONNX file; see :func:`tuner_client.model.load.load_model`.

    Args:
        path: The file. External weights are looked for beside it.
        shapes: Shapes given by the user, by input name.
    """
    load_tvm()
    model, weight_files = _read(path)
    _check_complete(model.graph, path)
    declared = _declared_inputs(model.graph)
    check_names(shapes, declared)
    fixed = {name: fixed_shape(name, shape, shapes.get(name)) for name, (shape, _) in declared.items()}
    _check_operators(model.graph, path)
    identifiers = _make_identifiers(model.graph, list(fixed))
    from tvm.relax.frontend.onnx import from_onnx

    try:
        with _quiet():
            module = from_onnx(model, shape_dict={identifiers[name]: list(s) for name, s in fixed.items()})
    except Exception as error:  # the frontend raises whatever a converter trips over
        raise ModelError(f"{path.name} cannot be imported: {one_line(error)}") from error
    return ImportedModel(
        name=path.stem,
        digest=_digest([path, *weight_files]),
        module=module,
        kind="onnx",
        inputs=tuple((name, fixed[name], dtype) for name, (_, dtype) in declared.items()),
    )


def _read(path: Path) -> tuple[Any, list[Path]]:
    """The model, and the files that its external weights are in."""
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    except Exception:  # protobuf's DecodeError, which has no public home
        raise ModelError(f"{path} is not an ONNX model, or is truncated") from None
    if not model.graph.node or not model.graph.output:
        raise ModelError(f"{path} is not an ONNX model, or is truncated (it holds no graph)")
    files = sorted({path.parent / name for name in _external_files(model)})  # loading forgets them
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # a missing or short file, or one outside the model's folder
        raise ModelError(f"external weights of {path.name} cannot be read: {one_line(error)}") from None
    return model, files


def _external_files(model: Any) -> Iterable[str]:
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                yield entry.value


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _check_complete(graph: Any, path: Path) -> None:
    """A file cut at a field's border still parses: look for tensors that nothing makes."""
    known = {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input} | {""}
    known |= {tensor.values.name for tensor in graph.sparse_initializer}
    for node in graph.node:
        missing = [name for name in node.input if name not in known]
        if missing:
            raise ModelError(
                f"{path} is not a complete ONNX model: nothing makes {missing[0]!r}, which {node.op_type} reads"
            )
        known.update(node.output)
    missing = [value.name for value in graph.output if value.name not in known]
    if missing:
        raise ModelError(f"{path} is not a complete ONNX model: nothing makes its output {missing[0]!r}")


def _declared_inputs(graph: Any) -> dict[str, tuple[tuple[int | str, ...] | None, str]]:
    """Shape (open sizes as text, None for an unknown rank) and dtype per input that is no weight."""
    import onnx

    weights = {tensor.name for tensor in graph.initializer}
    found: dict[str, tuple[tuple[int | str, ...] | None, str]] = {}
    for value in graph.input:
        if value.name in weights:
            continue
        kind = value.type.tensor_type
        try:
            dtype = str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
        except (KeyError, ValueError):
            raise ModelError(f"input {value.name!r} is not a tensor of numbers") from None
        shape: tuple[int | str, ...] | None = None
        if kind.HasField("shape"):
            shape = tuple(_extent(dim, number) for number, dim in enumerate(kind.shape.dim))
        found[value.name] = (shape, dtype)
    return found


def _make_identifiers(graph: Any, inputs: list[str]) -> dict[str, str]:
    """Rename inputs such as ``gpu_0/data_0`` in the graph: their names end up in generated CUDA source."""
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    identifiers: dict[str, str] = {}
    for name in inputs:
        identifier = re.sub(r"\W", "_", name, flags=re.ASCII)
        if not identifier or identifier[0].isdigit():
            identifier = f"input_{identifier}"
        while identifier != name and identifier in taken:
            identifier += "_"
        taken.add(identifier)
        identifiers[name] = identifier
    for value in graph.input:
        value.name = identifiers.get(value.name, value.name)
    for value in graph.output:  # an input may be an output as well
        value.name = identifiers.get(value.name, value.name)
    for node in _all_nodes(graph):
        for position, name in enumerate(node.input):
            node.input[position] = identifiers.get(name, name)
    return identifiers


def _extent(dim: Any, number: int) -> int | str:
    if dim.HasField("dim_value") and dim.dim_value > 0:
        return int(dim.dim_value)
    return str(dim.dim_param) or f"?{number}"


def _check_operators(graph: Any, path: Path) -> None:
    from tvm.relax.frontend.onnx import onnx_frontend

    supported = set(onnx_frontend._get_convert_map()) | _HANDLED_BY_IMPORTER
    unknown = sorted(
        {
            node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
            for node in _all_nodes(graph)
            if node.op_type not in supported
        }
    )
    if unknown:
        operators = "an operator" if len(unknown) == 1 else "operators"
        raise ModelError(f"{path.name} needs {operators} that TVM's ONNX frontend lacks: {', '.join(unknown)}")


def _all_nodes(graph: Any) -> Iterable[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                yield from _all_nodes(inner)


@contextlib.contextmanager
def _quiet() -> Any:
    """Send what the frontend prints and warns about to the log: standard output belongs to the caller."""
    printed = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(printed):
        warnings.simplefilter("always")
        try:
            yield
        finally:
            for warning in caught:
                log.info("importing: %s", warning.message)
            if printed.getvalue():
                log.info("importing: %s", printed.getvalue().strip())
