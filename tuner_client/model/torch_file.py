"""Programs written by ``torch.export.save`` (``.pt2``). torch is optional, and only imported here."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner_client.model.load import PACKAGE, ImportedModel, Shape, check_names, fixed_shape, one_line
from tuner_core.compiler.tvm_setup import load_tvm
from tuner_core.errors import ModelError

if TYPE_CHECKING:
    from tvm.ir import IRModule


def import_torch(path: Path, shapes: Mapping[str, Shape]) -> ImportedModel:
    """Import a ``torch.export`` program; see :func:`tuner_client.model.load.load_model`.

    Args:
        path: The file.
        shapes: Shapes given by the user, by input name.
    """
    if not zipfile.is_zipfile(path):
        raise ModelError(f"{path} is not a torch.export program, or is truncated")
    if importlib.util.find_spec("torch") is None:
        raise ModelError(f"{path.name} needs torch, which is not installed: pip install '{PACKAGE}[torch]'")
    program = _read(path)  # imports torch, which TVM's frontend needs to find when TVM is imported
    load_tvm()
    try:
        with _quiet():
            from tvm.relax.frontend.torch import from_exported_program

            module = from_exported_program(program, unwrap_unit_return_tuple=True)
    except Exception as error:  # the frontend raises whatever a converter trips over
        raise ModelError(_import_problem(path, error)) from error
    module, inputs = _fix_shapes(module, shapes)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return ImportedModel(name=path.stem, digest=digest, module=module, kind="torch", inputs=inputs)


def _read(path: Path) -> Any:
    import torch

    try:
        with _quiet():
            return torch.export.load(str(path))
    except Exception as error:  # torch raises RuntimeError, KeyError, ... for a damaged archive
        raise ModelError(f"{path} is not a torch.export program: {one_line(error)}") from error


def _import_problem(path: Path, error: Exception) -> str:
    unknown = re.search(r"Unsupported function types \[(.*?)\]", str(error))
    if unknown:
        names = ", ".join(
            sorted(name.strip().strip("'").removesuffix(".default") for name in unknown.group(1).split(","))
        )
        return f"{path.name} needs operators that TVM's torch frontend lacks: {names}"
    return f"{path.name} cannot be imported: {one_line(error)}"


def _fix_shapes(module: IRModule, shapes: Mapping[str, Shape]) -> tuple[IRModule, tuple[tuple[str, Shape, str], ...]]:
    """Bind the sizes that the program leaves open to those that the user gave."""
    from tvm import relax, tirx

    main = module["main"]
    declared: dict[str, tuple[int | str, ...]] = {}
    symbols: dict[str, list[Any]] = {}
    dtypes = {}
    for parameter in main.params:
        sizes = list(parameter.ty.shape) if parameter.ty.shape is not None else []
        declared[str(parameter.name)] = tuple(
            int(size) if isinstance(size, tirx.IntImm) else str(size) for size in sizes
        )
        symbols[str(parameter.name)] = sizes
        dtypes[str(parameter.name)] = str(parameter.ty.dtype)
    check_names(shapes, declared)
    fixed = {name: fixed_shape(name, shape, shapes.get(name)) for name, shape in declared.items()}
    bindings: dict[Any, int] = {}
    for name, sizes in symbols.items():
        for size, extent in zip(sizes, fixed[name], strict=True):
            if isinstance(size, tirx.Var) and bindings.setdefault(size, extent) != extent:
                raise ModelError(f"--input-shape: {size} is {bindings[size]} in one input and {extent} in {name!r}")
    if bindings:
        module = relax.transform.BindSymbolicVars(bindings, "main")(module)
    return module, tuple((name, fixed[name], dtypes[name]) for name in declared)


@contextlib.contextmanager
def _quiet() -> Any:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
