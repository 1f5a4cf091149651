"""The computing blocks of an operator before scheduling: iteration variables, loads, the stored expression."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvm.tirx import PrimFunc


@dataclass(frozen=True)
class Load:
    """One load: the buffer, its constant shape (0 where unknown), and the indices."""

    buffer: Any
    shape: tuple[int, ...]
    indices: tuple[Any, ...]


@dataclass(frozen=True)
class Block:
    """One block that stores one expression.

    Attributes:
        name: The block's name, e.g. ``conv2d_nchw``.
        variables: Iteration variables.
        extents: Their extents; 0 where unknown.
        spatial: Whether each is spatial (the others reduce).
        written: The buffer that is written.
        indices: Where it is written.
        value: The stored expression.
        loads: Loads of the expression, except those of ``written``.
    """

    name: str
    variables: tuple[Any, ...]
    extents: tuple[int, ...]
    spatial: tuple[bool, ...]
    written: Any
    indices: tuple[Any, ...]
    value: Any
    loads: tuple[Load, ...]

    @property
    def is_reduction(self) -> bool:
        """Whether any variable reduces."""
        return not all(self.spatial)

    @property
    def work(self) -> int:
        """Iterations in total."""
        return math.prod(max(1, extent) for extent in self.extents)

    def axes_of(self, expression: Any) -> frozenset[int]:
        """Numbers of the iteration variables that occur in an expression."""
        import tvm_ffi
        from tvm import ir

        found: list[Any] = []
        tvm_ffi.structural_walk(expression, (ir.Var, found.append))
        return frozenset(
            number for number, variable in enumerate(self.variables) if any(variable.same_as(node) for node in found)
        )

    def coefficient(self, expression: Any, axis: int) -> int | None:
        """By how much an index grows with one variable; None when that is not a constant."""
        from tvm import tirx
        from tvm.sym import detect_linear_equation

        linear = detect_linear_equation(expression, [self.variables[axis]])
        value = linear[0] if linear else None
        return int(value) if isinstance(value, int | tirx.IntImm) else None

    def calls(self) -> list[str]:
        """Names of the functions that the expression calls, e.g. ``exp``."""
        import tvm_ffi
        from tvm import ir

        names: list[str] = []

        def note(call: Any) -> None:
            names.append(str(getattr(call.op, "name", call.op)).rsplit(".", 1)[-1])

        tvm_ffi.structural_walk(self.value, (ir.Call, note))
        return names


def computing_blocks(function: PrimFunc) -> list[Block]:
    """The blocks of a function that store one expression each, in program order."""
    import tvm_ffi
    from tvm import s_tir, tirx

    statements: list[Any] = []
    tvm_ffi.structural_walk(function.body, (s_tir.SBlock, statements.append), order="pre")
    return [_block(statement) for statement in statements if isinstance(statement.body, tirx.BufferStore)]


def constant_shape(buffer: Any) -> tuple[int, ...]:
    """A buffer's shape; 0 where it is not constant."""
    from tvm import tirx

    return tuple(int(extent) if isinstance(extent, int | tirx.IntImm) else 0 for extent in buffer.shape)


def _block(statement: Any) -> Block:
    import tvm_ffi
    from tvm import ir, tirx

    store = statement.body
    found: list[Any] = []
    tvm_ffi.structural_walk(store.value, (ir.TensorLoad, found.append))
    extents = [var.dom.extent for var in statement.iter_vars]
    return Block(
        name=str(statement.name_hint),
        variables=tuple(var.var for var in statement.iter_vars),
        extents=tuple(int(extent) if isinstance(extent, tirx.IntImm) else 0 for extent in extents),
        spatial=tuple(var.iter_type == tirx.IterVar.DataPar for var in statement.iter_vars),
        written=store.buffer,
        indices=tuple(store.indices),
        value=store.value,
        loads=tuple(
            Load(load.source, constant_shape(load.source), tuple(load.indices))
            for load in found
            if not load.source.same_as(store.buffer)
        ),
    )
