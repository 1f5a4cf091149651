"""Schedule traces as JSON: the form in which records hold them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tuner_core.compiler.tvm_setup import load_tvm
from tuner_core.errors import InvalidRecordError

if TYPE_CHECKING:
    from tvm.ir import IRModule
    from tvm.s_tir import Schedule
    from tvm.s_tir.schedule import Trace


def trace_to_json(schedule: Schedule) -> str:
    """JSON of a schedule's trace, equal to what TVM's ``TuningRecord.as_json()[0]`` holds.

    Args:
        schedule: A traced schedule.

    Raises:
        InvalidRecordError: The schedule was made without a trace.
    """
    if schedule.trace is None:
        raise InvalidRecordError("this schedule was made without a trace")
    return trace_json(schedule.trace)


def trace_json(trace: Trace) -> str:
    """JSON of a trace, see :func:`trace_to_json`. TVM's own conversion in Python refuses what tensor cores need.

    Args:
        trace: A schedule's trace.
    """
    return json.dumps(trace.as_json(), separators=(",", ":"), default=_constant)


def apply_trace(mod: IRModule, trace_json: str) -> Schedule:
    """Replay a trace on a workload's module.

    Args:
        mod: Module of the workload that the trace was made for (block names matter, variable names do not).
        trace_json: As :func:`trace_to_json` gives it.

    Returns:
        A traced schedule; ``schedule.mod`` is the scheduled module.

    Raises:
        InvalidRecordError: Not a trace, or it does not fit this workload.
    """
    load_tvm(intrinsics=True)
    from tvm.s_tir import Schedule
    from tvm.s_tir.schedule import Trace

    schedule = Schedule(mod, error_render_level="fast")
    try:
        Trace.apply_json_to_schedule(_parse(trace_json), schedule)
    except InvalidRecordError:
        raise
    except Exception as error:  # a ScheduleError, or whatever malformed instructions provoke
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InvalidRecordError(f"the trace does not apply to its workload: {lines[-1][:300]}") from None
    return schedule


def is_empty(trace_json: str) -> bool:
    """Whether a trace has no instruction: it leaves the workload unscheduled."""
    return not _parse(trace_json)[0]


def _constant(value: Any) -> Any:
    """The number in one of TVM's constants; for the map of a layout TVM's JSON of it, as TVM's databases hold it."""
    import tvm
    from tvm import tirx

    if isinstance(value, tirx.IntImm | tirx.FloatImm):
        return value.value
    if isinstance(value, tirx.IndexMap):
        return tvm.ir.save_json(value)
    raise InvalidRecordError(f"a trace holds a {type(value).__name__}, which is no JSON value")


def _parse(trace_json: str) -> Any:
    try:
        trace = json.loads(trace_json)
    except ValueError:
        raise InvalidRecordError("a trace is not valid JSON") from None
    if not (isinstance(trace, list) and len(trace) == 2 and all(isinstance(part, list) for part in trace)):
        raise InvalidRecordError("a trace is a JSON list of instructions and decisions")
    return trace
