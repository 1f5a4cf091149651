"""What the tiled blocks of a sketch read and write, taken from the module as it is before they are cached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import Trace
from tvm.sym import detect_linear_equation

from tuner_server.search.shared_memory import Access, BlockAccesses, Span


def cached_blocks(mod: Any, instructions: Sequence[Any], decisions: Mapping[Any, Any]) -> dict[str, BlockAccesses]:
    """Accesses of the blocks whose inputs or outputs a sketch copies to shared memory.

    Args:
        mod: The workload's module.
        instructions: The sketch's trace.
        decisions: Any that are valid for it.

    Returns:
        By the block's name in the trace as JSON; blocks whose accesses cannot be read off are missing.
    """
    names = _names(instructions)
    found: dict[str, BlockAccesses] = {}
    for index, instruction in enumerate(instructions):
        if str(instruction.kind.name) not in ("CacheRead", "CacheWrite"):
            continue
        if not str(instruction.attrs[1]).startswith("shared"):
            continue
        place = next((place for place in names if place[0].same_as(instruction.inputs[0])), None)
        if place is None or place[1] in found:
            continue
        schedule = Schedule(mod, seed=1, debug_mask=0, error_render_level="none")
        Trace(list(instructions[:index]), decisions).apply_to_schedule(schedule, remove_postproc=True)
        block = schedule.get(list(schedule.trace.insts)[place[2]].outputs[place[3]])
        variables = [variable.var for variable in block.iter_vars]
        found[place[1]] = BlockAccesses(
            reads=tuple(_access(region, variables) for region in block.reads),
            write=_access(block.writes[0], variables),
        )
    return found


def _names(instructions: Sequence[Any]) -> list[tuple[Any, str, int, int]]:
    """Every block variable, its name in the trace's JSON, and which output of which instruction it is."""
    blocks = []
    number = 0
    for index, instruction in enumerate(instructions):
        for position, output in enumerate(instruction.outputs):
            if type(output).__name__ == "SBlockRV":
                blocks.append((output, f"b{number}", index, position))
            number += 1
    return blocks


def _access(region: Any, variables: Sequence[Any]) -> Access:
    spans = []
    for part, extent in zip(region.region, region.source.shape, strict=True):
        if not isinstance(part.extent, tirx.IntImm) or not isinstance(extent, tirx.IntImm):
            spans.append(Span(1, None, 1))
            continue
        linear = list(detect_linear_equation(part.min, variables))[:-1]
        strides = tuple(abs(int(one)) for one in linear) if all(map(_is_constant, linear)) else None
        known = strides is not None and len(strides) == len(variables)
        spans.append(Span(int(part.extent), strides if known else None, int(extent)))
    return Access(max(1, int(tvm_ffi.dtype(str(region.source.dtype)).itemsize)), tuple(spans))


def _is_constant(value: Any) -> bool:
    return isinstance(value, int | tirx.IntImm)
