"""MetaSchedule's part of a search: the design spaces of a workload, and points of them turned into schedules."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import tvm_ffi
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.schedule import Instruction, ScheduleError, Trace
from tvm.target import Target

from tuner_core.compiler.guard import load_workload
from tuner_core.compiler.trace import trace_json
from tuner_server.search.accesses import cached_blocks
from tuner_server.search.build_cost import UnrolledStatements
from tuner_server.search.registers import RegisterLimits
from tuner_server.search.shared_memory import SharedMemoryLimits
from tuner_server.search.space import DesignSpace, Point, Value
from tuner_server.search.statements import StatementLimits
from tuner_server.search.threads import ThreadLimits

_GENERATIONS = 8


@dataclass(frozen=True)
class Applied:
    """A point that became a valid schedule.

    Attributes:
        trace: JSON of its trace, with what the post-processors did.
        point: What was decided in the end; None when the trace is not of the space after all.
        module_hash: Structural hash of the scheduled module.
        module: The scheduled module.
    """

    trace: str
    point: Point | None
    module_hash: int
    module: Any


@dataclass(frozen=True)
class Rejected:
    """A point that did not become a valid schedule.

    Attributes:
        reason: The post-processor that refused it, or the type of the error.
        point: What was decided, where that is known.
    """

    reason: str
    point: Point | None


class Limits(Protocol):
    """What a target refuses, told by arithmetic. ``of`` says what there is too little or too much of."""

    of: str

    def allow(self, point: Point) -> bool:
        """Whether a point is not surely refused."""
        ...


class Sketches:
    """The design spaces of one workload on one target.

    Attributes:
        target: The target.
        spaces: The spaces.
        bases: The point that MetaSchedule drew while it made each of them, if it decided everything.

    Args:
        body: The workload's JSON.
        target_json: The target.
        seed: For the choices that MetaSchedule makes while it generates the spaces.

    Raises:
        UsageError: The workload is malformed, or holds what no operator needs.
    """

    def __init__(self, body: str, target_json: str, seed: int) -> None:
        self._mod = load_workload(body)
        self.target = Target(json.loads(target_json))
        context, sketches = self._generate(seed)
        self._context = context  # the post-processors belong to it
        self._postprocs = list(context.space_generator.postprocs or ())
        self._instructions = [list(sketch.trace.insts) for sketch in sketches]
        traces = [json.loads(trace_json(sketch.trace)) for sketch in sketches]
        self.spaces = [DesignSpace(index, trace) for index, trace in enumerate(traces)]
        self.bases = [space.point_of(trace) for space, trace in zip(self.spaces, traces, strict=True)]
        self._statements = [
            UnrolledStatements(space, trace[0]) if "gpu" in self.target.keys else None
            for space, trace in zip(self.spaces, traces, strict=True)
        ]
        self._limits = [
            self._limits_of(space, trace[0], sketch) if "gpu" in self.target.keys else ()
            for space, trace, sketch in zip(self.spaces, traces, sketches, strict=True)
        ]

    def _limits_of(
        self, space: DesignSpace, instructions: Sequence[Sequence[Any]], sketch: Schedule
    ) -> tuple[Limits, ...]:
        """What a GPU refuses, by arithmetic: the cheapest check first."""

        def attribute(name: str, default: int) -> int:
            return int(self.target.attrs.get(name, default))

        max_threads, warp_size = attribute("max_threads_per_block", 1024), attribute("thread_warp_size", 32)
        accesses = cached_blocks(self._mod, self._instructions[space.index], sketch.trace.decisions)
        shared = SharedMemoryLimits(space, instructions, accesses, attribute("max_shared_memory_per_block", 49152))
        return (
            ThreadLimits(space, instructions, max_threads, warp_size),
            RegisterLimits(space, instructions, _value_bytes(self._mod), attribute("registers_per_block", 65536)),
            shared,
            StatementLimits(space, instructions, shared, warp_size),
        )

    def _generate(self, seed: int) -> tuple[ms.TuneContext, Sequence[Schedule]]:
        """The spaces of the first seed that gives any: those of padded products meet illegal loops now and then."""
        problem: ScheduleError | None = None
        for attempt in range(_GENERATIONS):
            with self.target:
                context = ms.TuneContext(
                    self._mod,
                    target=self.target,
                    space_generator="post-order-apply",
                    search_strategy="replay-trace",
                    rand_state=seed + attempt,
                    num_threads=1,
                )
                try:
                    return context, context.generate_design_space()
                except ScheduleError as error:
                    problem = error
        assert problem is not None
        raise problem

    def allows(self, space: DesignSpace, point: Point) -> bool:
        """Whether a point is not surely invalid or hopeless, by arithmetic."""
        return self._refused_for(space, point) is None

    def _refused_for(self, space: DesignSpace, point: Point) -> str | None:
        return next((limit.of for limit in self._limits[space.index] if not limit.allow(point)), None)

    def build_cost(self, located: tuple[DesignSpace, Point]) -> float:
        """What building a point costs relative to others (see :mod:`tuner_server.search.build_cost`); 1 on a CPU."""
        space, point = located
        statements = self._statements[space.index]
        return 1.0 if statements is None else statements.of(point)

    def apply(self, space: DesignSpace, point: Point | None, seed: int) -> Applied | Rejected:
        """Make a schedule of a point.

        Args:
            space: The space.
            point: What to decide; None: TVM decides at random.
            seed: Of the random decisions.
        """
        schedule = Schedule(self._mod, seed=seed, debug_mask=0, error_render_level="none")
        try:
            self._decided(space, point).apply_to_schedule(schedule, remove_postproc=True)
        except Exception as error:  # a ScheduleError, or a check inside a primitive
            return Rejected(type(error).__name__, point)
        if point is None:
            point = space.point_of(json.loads(trace_json(schedule.trace)))
            if point is not None and (reason := self._refused_for(space, point)):
                return Rejected(reason, point)
        try:
            schedule.enter_postproc()
            for postproc in self._postprocs:
                if not postproc.apply(schedule):
                    return Rejected(str(postproc).rsplit(".", 1)[-1].split("(")[0], point)
        except Exception as error:
            return Rejected(type(error).__name__, point)
        text = trace_json(schedule.trace)
        module = schedule.mod
        return Applied(text, space.point_of(json.loads(text)), tvm_ffi.structural_hash(module), module)

    def _decided(self, space: DesignSpace, point: Point | None) -> Trace:
        instructions = self._instructions[space.index]
        if point is None:
            return Trace(instructions, {})
        instructions = list(instructions)
        decisions: dict[Any, Any] = {}
        for knob, value in zip(space.knobs, point, strict=True):
            if knob.kind == "parallel":
                instructions[knob.position] = _with_limit(instructions[knob.position], value)
            else:
                decisions[instructions[knob.position]] = list(value) if isinstance(value, tuple) else value
        return Trace(instructions, decisions)


def _value_bytes(mod: Any) -> int:
    """Size of an element of the output, which is the last parameter; what is accumulated is at least as large."""
    return max(2, int(tvm_ffi.dtype(str(mod["main"].params[-1].dtype)).itemsize))


def _with_limit(instruction: Any, limit: Value) -> Any:
    inputs: Sequence[Any] = [instruction.inputs[0], limit]
    return Instruction(instruction.kind, inputs, instruction.attrs, instruction.outputs)
