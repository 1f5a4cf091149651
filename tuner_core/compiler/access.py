"""What a block reads and writes along each of its loops: the facts that a schedule is chosen by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvm.s_tir import Schedule

_FAR = 1 << 30  # a stride that no vector spans


@dataclass(frozen=True)
class BlockAccess:
    """One block whose iteration variables stand for its loops, one each.

    Attributes:
        extents: Iterations per loop, outermost first; 0 where unknown.
        spatial: Whether each loop is spatial (the others reduce).
        write_strides: Elements between the writes of consecutive iterations, per loop.
        read_strides: The same for every read (one tuple per read).
        element_bits: Width of the written type.
        costs_to_repeat: Holds a branch or a function call: not worth computing more than once.
    """

    extents: tuple[int, ...]
    spatial: tuple[bool, ...]
    write_strides: tuple[int, ...]
    read_strides: tuple[tuple[int, ...], ...]
    element_bits: int
    costs_to_repeat: bool

    @property
    def static(self) -> bool:
        """Whether all extents are known."""
        return all(self.extents)

    @property
    def is_reduction(self) -> bool:
        """Whether any loop reduces."""
        return not all(self.spatial)

    @property
    def work(self) -> int:
        """Iterations in total."""
        total = 1
        for extent in self.extents:
            total *= max(1, extent)
        return total

    def vector_axis(self, max_stride: int) -> int | None:
        """The spatial loop that writes consecutive elements and reads with a stride of at most ``max_stride``."""
        for axis in reversed(range(len(self.extents))):
            if self.spatial[axis] and self.extents[axis] > 1 and self.write_strides[axis] == 1:
                if all(strides[axis] <= max_stride for strides in self.read_strides):
                    return axis
                return None
        return None

    def row_axis(self, excluding: int | None) -> int | None:
        """The spatial loop to unroll: one along which some read stays the same, the longest of them."""
        candidates = [
            axis
            for axis in range(len(self.extents))
            if self.spatial[axis] and axis != excluding and self.extents[axis] > 1
        ]
        if not candidates:
            return None
        return max(candidates, key=lambda axis: (self._reuse(axis), self.extents[axis]))

    def _reuse(self, axis: int) -> bool:
        return any(strides[axis] == 0 for strides in self.read_strides)


def analyse_block(schedule: Schedule, block: Any) -> BlockAccess:
    """Read the facts from a block that is still in the form in which operators are legalised.

    Args:
        schedule: The schedule that holds it.
        block: Its random variable.

    Raises:
        ValueError: Loops and iteration variables are not one to one, or the block writes several buffers.
    """
    import tvm_ffi
    from tvm import ir, tirx

    stmt = schedule.get(block)
    loops = [schedule.get(loop) for loop in schedule.get_loops(block)]
    extents = tuple(int(loop.extent) if isinstance(loop.extent, tirx.IntImm) else 0 for loop in loops)
    if len(loops) != len(stmt.iter_vars) or len(stmt.writes) != 1:
        raise ValueError("the block is not in its original form")
    spatial = tuple(var.iter_type == tirx.IterVar.DataPar for var in stmt.iter_vars)
    variables = [var.var for var in stmt.iter_vars]

    loads: list[Any] = []
    calls: list[Any] = []

    store = stmt.body
    if not isinstance(store, tirx.BufferStore):
        raise ValueError("the block's body is not one store")
    tvm_ffi.structural_walk(store.value, [(ir.TensorLoad, loads.append), ((ir.Call, tirx.Select), calls.append)])
    written = store.buffer
    reads = tuple(
        _strides(load.source, load.indices, variables) for load in loads if not load.source.same_as(written)
    )
    return BlockAccess(
        extents=extents,
        spatial=spatial,
        write_strides=_strides(written, store.indices, variables),
        read_strides=reads,
        element_bits=_bits(str(written.dtype)),
        costs_to_repeat=bool(calls),
    )


def _strides(buffer: Any, indices: Any, variables: list[Any]) -> tuple[int, ...]:
    """Elements between the accesses of consecutive iterations of each variable; ``_FAR`` when not constant."""
    from tvm import tirx

    shape = [int(extent) if isinstance(extent, tirx.IntImm) else 0 for extent in buffer.shape]
    totals = [0] * len(variables)
    step = 1
    for index, extent in reversed(list(zip(indices, shape, strict=True))):
        coefficients = _coefficients(index, variables)
        for axis, coefficient in enumerate(coefficients):
            if coefficient is None:
                totals[axis] = _FAR
            elif coefficient and totals[axis] != _FAR:
                totals[axis] += coefficient * step if step else _FAR
        step *= extent
    return tuple(min(abs(total), _FAR) for total in totals)


def _coefficients(index: Any, variables: list[Any]) -> list[int | None]:
    """Per variable, by how much the index grows with it; None when that is not a constant."""
    import tvm_ffi
    from tvm import ir, tirx
    from tvm.sym import detect_linear_equation

    used: list[Any] = []
    tvm_ffi.structural_walk(index, (ir.Var, used.append))
    present = [any(var.same_as(node) for node in used) for var in variables]
    if not any(present):
        return [0] * len(variables)
    linear = detect_linear_equation(index, [var for var, here in zip(variables, present, strict=True) if here])
    if not linear:
        return [None if here else 0 for here in present]
    values = iter(linear)
    result: list[int | None] = []
    for here in present:
        value = next(values) if here else 0
        result.append(int(value) if isinstance(value, int | tirx.IntImm) else None)
    return result


def _bits(dtype: str) -> int:
    digits = "".join(character for character in dtype if character.isdigit())
    return int(digits) if digits else 8
