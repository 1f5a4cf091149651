"""What a block reads and writes along each of its loops: the facts that a schedule is chosen by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvm.s_tir import Schedule

_FAR = 1 << 30  # a stride that no vector spans


@dataclass(frozen=True)
class Read:
    """One load of a block.

    Attributes:
        position: Index of its buffer among the block's reads, as ``cache_read`` counts them.
        strides: Elements between the reads of consecutive iterations, per loop; 0 where the loop does not matter.
        plain_dims: Per loop, the buffer's dimension that is indexed by exactly this loop, or None.
        elements: Elements of the buffer.
    """

    position: int
    strides: tuple[int, ...]
    plain_dims: tuple[int | None, ...]
    elements: int


@dataclass(frozen=True)
class Packable:
    """A read whose buffer may be copied so that the elements along a loop become consecutive.

    Attributes:
        axis: The loop.
        read: The read's position.
        dim: The loop's dimension in the buffer that is read.
        output_dim: Its dimension in the buffer that is written.
    """

    axis: int
    read: int
    dim: int
    output_dim: int


@dataclass(frozen=True)
class BlockAccess:
    """One block whose iteration variables stand for its loops, one each.

    Attributes:
        extents: Iterations per loop, outermost first; 0 where unknown.
        spatial: Whether each loop is spatial (the others reduce).
        write_strides: Elements between the writes of consecutive iterations, per loop.
        write_dims: Per loop, the written buffer's dimension that is indexed by exactly this loop, or None.
        reads: The loads, except those of the accumulator.
        element_bits: Width of the written type.
        branch_axes: Loops that a condition depends on, as in padding and concatenation.
        costs_to_repeat: Holds a branch or a function call: not worth computing more than once.
    """

    extents: tuple[int, ...]
    spatial: tuple[bool, ...]
    write_strides: tuple[int, ...]
    write_dims: tuple[int | None, ...]
    reads: tuple[Read, ...]
    element_bits: int
    branch_axes: frozenset[int]
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
        return math.prod(max(1, extent) for extent in self.extents)

    @property
    def reduction_size(self) -> int:
        """Iterations per output element."""
        return math.prod(extent for extent, spatial in zip(self.extents, self.spatial, strict=True) if not spatial)

    def vector_axis(self, max_stride: int) -> int | None:
        """The spatial loop that writes consecutive elements and reads with a stride of at most ``max_stride``."""
        for axis in reversed(range(len(self.extents))):
            if self.spatial[axis] and self.extents[axis] > 1 and self.write_strides[axis] == 1:
                if all(read.strides[axis] <= max_stride for read in self.reads):
                    return axis
                return None
        return None

    def row_axes(self, excluding: int | None, with_vector: bool) -> list[int]:
        """Spatial loops to unroll, best first: those along which some read stays the same, the longest of them first.

        Args:
            excluding: The vector loop.
            with_vector: Only loops along which what the vector loop reads stays the same, innermost first.
        """
        axes = [axis for axis, wide in enumerate(self.extents) if self.spatial[axis] and axis != excluding and wide > 1]
        if with_vector and excluding is not None:
            vectors = [read for read in self.reads if read.strides[excluding]]
            return [axis for axis in reversed(axes) if all(read.strides[axis] == 0 for read in vectors)]
        axes.sort(key=lambda axis: (self._reuses(axis), self.extents[axis]), reverse=True)
        return axes[:1]

    def _reuses(self, axis: int) -> bool:
        return any(read.strides[axis] == 0 for read in self.reads)

    def packable(self, min_uses: int) -> Packable | None:
        """The loop to vectorise over a copy of its weights, when each weight is used at least ``min_uses`` times."""
        for axis, is_spatial in enumerate(self.spatial):
            if not is_spatial or self.extents[axis] < 2:
                continue
            varying = [read for read in self.reads if read.strides[axis]]
            if len(varying) != 1 or len(self.reads) < 2:
                continue
            dim, output_dim = varying[0].plain_dims[axis], self.write_dims[axis]
            if dim is None or output_dim is None:
                continue
            if self.work >= min_uses * varying[0].elements:
                return Packable(axis, varying[0].position, dim, output_dim)
        return None


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
    regions = [region.source for region in stmt.reads]
    reads = tuple(_read(load, regions, variables) for load in loads if not load.source.same_as(written))
    return BlockAccess(
        extents=extents,
        spatial=spatial,
        write_strides=_strides(written, store.indices, variables),
        write_dims=_plain_dims(store.indices, variables),
        reads=reads,
        element_bits=_bits(str(written.dtype)),
        branch_axes=_branch_axes(calls, variables),
        costs_to_repeat=bool(calls),
    )


def _plain_dims(indices: Any, variables: list[Any]) -> tuple[int | None, ...]:
    plain: list[int | None] = [None] * len(variables)
    for dim, index in enumerate(indices):
        for axis, variable in enumerate(variables):
            if index.same_as(variable):
                plain[axis] = dim
    return tuple(plain)


def _read(load: Any, regions: list[Any], variables: list[Any]) -> Read:
    from tvm import tirx

    shape = [int(extent) if isinstance(extent, tirx.IntImm) else 0 for extent in load.source.shape]
    position = next(number for number, buffer in enumerate(regions) if buffer.same_as(load.source))
    strides = _strides(load.source, load.indices, variables)
    return Read(position, strides, _plain_dims(load.indices, variables), math.prod(shape))


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


def _branch_axes(calls: list[Any], variables: list[Any]) -> frozenset[int]:
    import tvm_ffi
    from tvm import ir, tirx

    used: list[Any] = []
    for call in calls:
        if isinstance(call, tirx.Select):
            tvm_ffi.structural_walk(call.condition, (ir.Var, used.append))
        elif "if_then_else" in str(call.op):
            tvm_ffi.structural_walk(call.args[0], (ir.Var, used.append))
    return frozenset(axis for axis, variable in enumerate(variables) if any(variable.same_as(node) for node in used))


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
