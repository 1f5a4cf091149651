"""Put schedules into a prepared model: records where there are any, the fallback for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tuner_core.compiler.fallback import fallback_schedule, is_gpu
from tuner_core.compiler.trace import apply_trace, is_empty
from tuner_core.compiler.tvm_setup import load_tvm
from tuner_core.compiler.workload import canonical_body, module_from_body, normalise
from tuner_core.errors import InvalidRecordError, TunerError
from tuner_core.model import sha256_hex

if TYPE_CHECKING:
    from tvm.ir import GlobalVar, IRModule
    from tvm.target import Target
    from tvm.tirx import PrimFunc


@dataclass(frozen=True)
class Coverage:
    """Which functions of a model run which schedule; names are those of the prepared module.

    Attributes:
        total_calls: Calls of TIR functions in the model.
        tuned_calls: Those that reach a tuned function.
        tuned: Functions that run a record's schedule.
        fallback: Functions that run the fallback schedule.
        invalid: Functions whose trace did not apply, with the reason; they are in ``fallback`` too.
        unused: Digests of traces that no function of the module matches.
    """

    total_calls: int
    tuned_calls: int
    tuned: tuple[str, ...]
    fallback: tuple[str, ...]
    invalid: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Functions of the model."""
        return len(self.tuned) + len(self.fallback)

    def as_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return {
            "total_calls": self.total_calls,
            "tuned_calls": self.tuned_calls,
            "tuned": list(self.tuned),
            "fallback": list(self.fallback),
            "invalid": dict(self.invalid),
            "unused": list(self.unused),
        }


def apply_schedules(prepared: IRModule, target: Target, traces: Mapping[str, str]) -> tuple[IRModule, Coverage]:
    """Replace every TIR function of a prepared module by its scheduled version.

    Args:
        prepared: A module from the preparation, with its constants or with them lifted.
        target: What it will run on.
        traces: Trace JSON by workload digest. A trace without instructions counts as none.

    Returns:
        The scheduled module and what got which schedule.

    Raises:
        TunerError: A GPU function that neither a trace nor dlight can schedule.
    """
    load_tvm(intrinsics=True)
    import tvm
    from tvm import relax

    functions = {var: f for var, f in prepared.functions.items() if isinstance(f, tvm.tirx.PrimFunc)}
    invalid: dict[str, str] = {}
    tuned: list[str] = []
    fallback: list[str] = []
    matched: set[str] = set()
    # before scheduling: only an unscheduled reshape is recognised, and becomes a view instead of a copy
    result = relax.transform.RewriteDataflowReshape()(prepared)
    for group in _equal_functions(functions, with_bodies=bool(traces)):
        scheduled, digest, problem = _schedule_group(group, target, traces)
        for var, function in group.members:
            result.update_func(result.get_global_var(var.name_hint), _with_attributes_of(function, scheduled))
            (fallback if digest is None else tuned).append(var.name_hint)
            if problem:
                invalid[var.name_hint] = problem
        matched.update(group.digests)
    calls = _calls(prepared)
    return result, Coverage(
        total_calls=sum(calls.values()),
        tuned_calls=sum(calls.get(name, 0) for name in tuned),
        tuned=tuple(sorted(tuned)),
        fallback=tuple(sorted(fallback)),
        invalid=invalid,
        unused=tuple(sorted(set(traces) - matched)),
    )


@dataclass
class _Group:
    """Functions that are structurally equal; digests may differ, for they hold block names that equality ignores."""

    module: Any
    members: list[tuple[GlobalVar, PrimFunc]]
    bodies: dict[str, str]
    """Canonical JSON by digest."""

    @property
    def digests(self) -> list[str]:
        return list(self.bodies)


def _equal_functions(functions: Mapping[GlobalVar, PrimFunc], *, with_bodies: bool) -> list[_Group]:
    """Groups of functions; their bodies, 10 ms each, only when asked for."""
    import tvm_ffi

    by_hash: dict[int, list[_Group]] = {}
    groups: list[_Group] = []
    for var, function in functions.items():
        module = normalise(function)
        candidates = by_hash.setdefault(tvm_ffi.structural_hash(module), [])
        group = next((g for g in candidates if tvm_ffi.structural_equal(g.module, module)), None)
        if group is None:
            group = _Group(module, [], {})
            candidates.append(group)
            groups.append(group)
        group.members.append((var, function))
        if with_bodies:
            body = canonical_body(module)
            group.bodies.setdefault(sha256_hex(body), body)
    return groups


def _schedule_group(group: _Group, target: Target, traces: Mapping[str, str]) -> tuple[PrimFunc, str | None, str]:
    """The scheduled function, the digest whose trace it runs (None: fallback), and why a trace did not apply."""
    problem = ""
    for digest, body in group.bodies.items():
        trace = traces.get(digest)
        if trace is None or is_empty(trace):
            continue
        try:
            scheduled = apply_trace(module_from_body(body), trace).mod["main"]
        except InvalidRecordError as error:
            problem = str(error)
            continue
        if not is_gpu(target) or _binds_threads(scheduled):
            return scheduled, digest, ""
        problem = "the trace binds no threads: it is not for a GPU"
    try:
        return fallback_schedule(group.module, target).mod["main"], None, problem
    except TunerError as error:
        names = ", ".join(var.name_hint for var, _ in group.members)
        raise TunerError(f"{names}: {error}") from None


def _binds_threads(function: PrimFunc) -> bool:
    """TVM builds a GPU function without threads into one that runs on the host, and crashes there."""
    import tvm_ffi
    from tvm import tirx

    bound: list[Any] = []
    tvm_ffi.structural_walk(
        function.body, (tirx.For, lambda loop: bound.append(loop) if loop.thread_binding is not None else None)
    )
    return bool(bound)


def _with_attributes_of(original: PrimFunc, scheduled: PrimFunc) -> PrimFunc:
    """The scheduled body under the original's attributes: preparation's names and marks must survive."""
    kept = dict(original.attrs.items()) if original.attrs else {}
    for name in list(scheduled.attrs.keys()) if scheduled.attrs else []:
        if name not in kept:
            scheduled = scheduled.without_attr(name)
    for name, value in kept.items():
        scheduled = scheduled.with_attr(name, value)
    return scheduled.with_attr("tirx.is_scheduled", True)


def _calls(prepared: IRModule) -> dict[str, int]:
    """How often the model calls each TIR function."""
    import tvm
    from tvm import relax

    counts: dict[str, int] = {}

    def visit(node: Any) -> None:
        if isinstance(node, relax.Call) and node.args and isinstance(node.args[0], tvm.ir.GlobalVar):
            name = node.args[0].name_hint
            counts[name] = counts.get(name, 0) + 1

    for function in prepared.functions.values():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function, visit)
    return counts
